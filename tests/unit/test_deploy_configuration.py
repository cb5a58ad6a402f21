"""The production configuration: safe, spelt as TorchServe reads it, and found wherever torchport is installed."""

from __future__ import annotations

import importlib.util
import re
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from deploy import configuration
from deploy.configuration import (
    CONFIG_FILE,
    LOG_CONFIG,
    METRICS_CONFIG,
    find_properties,
    read_properties,
    server_properties,
)
from deploy.errors import StartError
from deploy.ports import Ports

ROOT = Path(__file__).resolve().parents[2]
PORTS = Ports(inference=18000, management=18001, metrics=18002, grpc_inference=18003, grpc_management=18004)
CONFIG_MANAGER = "org/pytorch/serve/util/ConfigManager.class"


@pytest.fixture
def properties() -> dict[str, str]:
    return read_properties(find_properties())


def parsed(text: str, folder: Path) -> dict[str, str]:
    file = folder / "written.properties"
    file.write_text(text, encoding="ascii")
    return read_properties(file)


def written(folder: Path, *, store: Path = Path("/store"), scalable: bool = False) -> dict[str, str]:
    models = {"digits": Path("/store/digits.mar"), "other": Path("/store/other.mar")}
    return parsed(
        server_properties(PORTS, host="127.0.0.1", model_store=store, models=models, scalable=scalable), folder
    )


def torchserve_jar() -> Path:
    spec = importlib.util.find_spec("ts")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "frontend" / "model-server.jar"


@pytest.fixture(scope="module")
def known_words() -> set[str]:
    """Every lower-case word among the constants of TorchServe's ConfigManager; its keys are some of them.

    And the one key that is for TorchServe's launcher, which is written in Python.
    """
    with zipfile.ZipFile(torchserve_jar()) as jar:
        content = jar.read(CONFIG_MANAGER)
    # A constant is the byte 1, its length in two bytes, and its text.
    found = re.finditer(rb"\x01\x00(.)([a-z][a-z0-9_]*)", content, re.DOTALL)
    words = {match[2][: match[1][0]].decode() for match in found if len(match[2]) >= match[1][0]}
    launcher = (torchserve_jar().parents[1] / "model_server.py").read_text(encoding="utf-8")
    return words | {key for key in ("vmargs",) if f'props.get("{key}")' in launcher}


def test_comments_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "some.properties"
    file.write_text("# a=b\n\n key = value \nurl=http://h:1/?a=b\nempty=\nkey=last\n", encoding="utf-8")
    assert read_properties(file) == {"key": "last", "url": "http://h:1/?a=b", "empty": ""}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("disable_token_authorization", "false"),
        ("management_address", "http://127.0.0.1:8081"),
        ("metrics_address", "http://127.0.0.1:8082"),
        ("grpc_inference_address", "127.0.0.1"),
        ("grpc_management_address", "127.0.0.1"),
        ("enable_model_api", "false"),
        ("enable_envvars_config", "false"),
        ("install_py_dep_per_model", "false"),
        ("load_models", "none"),
    ],
)
def test_what_is_unsafe_is_off(properties: dict[str, str], tmp_path: Path, key: str, value: str) -> None:
    assert properties[key] == value
    if not key.endswith("_address") and key != "load_models":
        assert written(tmp_path)[key] == value


@pytest.mark.parametrize(
    "url", ["http://example.org/a.mar", "https://example.org/a.mar", "file:///etc/passwd", "s3://bucket/a.mar"]
)
def test_no_model_can_be_loaded_from_an_address(properties: dict[str, str], url: str) -> None:
    assert not any(re.fullmatch(pattern, url) for pattern in properties["allowed_urls"].split(","))


def test_tokens_expire(properties: dict[str, str]) -> None:
    assert 0 < int(properties["token_expiration_min"]) <= 60


def test_the_words_of_torchserve_are_read_right(known_words: set[str]) -> None:
    assert {"job_queue_size", "allowed_urls", "disable_token_authorization", "metrics_mode"} <= known_words
    assert "job_queue_sise" not in known_words


def test_no_key_is_misspelt(properties: dict[str, str], tmp_path: Path, known_words: set[str]) -> None:
    assert properties.keys() - known_words == set()
    assert written(tmp_path).keys() - known_words == set()


def test_no_key_comes_twice() -> None:
    lines = find_properties().read_text(encoding="utf-8").splitlines()
    keys = [line.partition("=")[0] for line in lines if line and not line.startswith("#")]
    assert sorted(keys) == sorted(set(keys))


def test_a_server_gets_its_own_addresses_and_models(tmp_path: Path) -> None:
    found = written(tmp_path)
    assert found["inference_address"] == "http://127.0.0.1:18000"
    assert found["management_address"] == "http://127.0.0.1:18001"
    assert found["metrics_address"] == "http://127.0.0.1:18002"
    assert (found["grpc_inference_port"], found["grpc_management_port"]) == ("18003", "18004")
    assert found["load_models"] == "digits=digits.mar,other=other.mar"
    assert found["metrics_config"] == str(METRICS_CONFIG)
    assert found["enable_model_api"] == "false"


def test_only_a_server_that_is_to_be_scaled_can_be(tmp_path: Path) -> None:
    assert written(tmp_path, scalable=True)["enable_model_api"] == "true"


def test_a_path_beyond_ascii_is_written_as_java_reads_it(tmp_path: Path) -> None:
    value = written(tmp_path, store=Path("/home/jörg/🐍/a\\b"))["model_store"]
    assert value == r"/home/j\u00f6rg/\ud83d\udc0d/a\\b"


def test_a_checkout_has_its_configuration_beside_the_packages() -> None:
    assert find_properties() == ROOT / CONFIG_FILE


def test_an_install_has_it_in_its_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where setuptools puts it is said by pyproject.toml; installing for real takes too long here.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    ((folder, files),) = project["tool"]["setuptools"]["data-files"].items()
    assert files == [CONFIG_FILE]
    data, package = tmp_path / "data", tmp_path / "lib" / "deploy"
    (data / folder).mkdir(parents=True)
    (data / folder / CONFIG_FILE).write_text("", encoding="utf-8")
    package.mkdir(parents=True)
    monkeypatch.setattr(configuration, "_PACKAGE", package)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(data) if name == "data" else "")
    assert find_properties() == data / folder / CONFIG_FILE


def test_an_install_without_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "_PACKAGE", tmp_path / "deploy")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "data"))
    with pytest.raises(StartError, match=r"config.properties is not in .*install torchport again"):
        find_properties()


def test_the_log_goes_to_stdout_and_holds_warnings_only() -> None:
    root = ElementTree.parse(LOG_CONFIG).getroot()
    assert root.tag == "Configuration"
    assert [appender.get("target") for appender in root.findall("Appenders/Console")] == ["SYSTEM_OUT"]
    logger = root.find("Loggers/Root")
    assert logger is not None
    assert logger.get("level") == "warn"
    names = {appender.get("name") for appender in root.findall("Appenders/*")}
    assert {reference.get("ref") for reference in root.iter("AppenderRef")} <= names


def test_the_metrics_are_what_torchserve_requires() -> None:
    document = yaml.safe_load(METRICS_CONFIG.read_text(encoding="utf-8"))
    assert set(document) == {"dimensions", "ts_metrics", "model_metrics"}
    assert set(document["dimensions"]) == {"ModelName", "WorkerName", "Level", "Hostname", "device_id"}
    for section in ("ts_metrics", "model_metrics"):
        assert set(document[section]) <= {"counter", "gauge", "histogram"}
        for metrics in document[section].values():
            assert all(set(metric) == {"name", "unit", "dimensions"} for metric in metrics)
    # TorchServe's frontend updates these by name.
    declared = {metric["name"] for metrics in document["ts_metrics"].values() for metric in metrics}
    assert declared == {
        *("Requests2XX", "Requests4XX", "Requests5XX", "QueueTime", "WorkerThreadTime", "WorkerLoadTime"),
        *("ts_inference_requests_total", "ts_inference_latency_microseconds", "ts_queue_latency_microseconds"),
        *("GPUUtilization", "GPUMemoryUtilization", "GPUMemoryUsed"),
    }


def test_no_gpu_is_handed_out_to_models_for_a_cpu(tmp_path: Path, known_words: set[str]) -> None:
    assert written(tmp_path)["number_of_gpu"] == "0"
    assert {"number_of_gpu", "disable_system_metrics", "system_metrics_cmd", "metric_time_interval"} <= known_words
