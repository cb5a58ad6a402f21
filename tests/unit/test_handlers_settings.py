"""Settings of a worker: the archive's, and what the environment replaces of them."""

import pytest

from handlers.errors import LoadError
from handlers.settings import WorkerSettings


def read(section, **environment):
    config = None if section is None else {"minWorkers": 1, "torchport": section}
    return WorkerSettings.read(config, environment)


@pytest.mark.parametrize("config", [None, {}, {"minWorkers": 2}, {"torchport": None}, {"torchport": {}}])
def test_defaults_without_a_section(config):
    assert WorkerSettings.read(config, {}) == WorkerSettings(
        threads=1, computing=0, max_batch=0, decoding=0, lanes=0, cuda_graphs=1, gpu_memory_mib=0, jpeg_on_gpu=0
    )


def test_the_file_is_read():
    section = {"threads": 3, "computing": 2, "max_batch": 64, "decoding": 5}
    section |= {"lanes": 1, "cuda_graphs": 0, "gpu_memory_mib": 9, "jpeg_on_gpu": 1}
    assert read(section) == WorkerSettings(**section)


def test_the_environment_replaces_what_it_names_and_nothing_else():
    section = {"threads": 3, "computing": 2, "max_batch": 64}
    assert read(section, TORCHPORT_THREADS="4") == WorkerSettings(threads=4, computing=2, max_batch=64)
    assert read(section, TORCHPORT_COMPUTING="0") == WorkerSettings(threads=3, computing=0, max_batch=64)
    assert read(None, TORCHPORT_MAX_BATCH="8") == WorkerSettings(max_batch=8)
    assert read(None, TORCHPORT_DECODING="2") == WorkerSettings(decoding=2)
    assert read(None, TORCHPORT_LANES="1", TORCHPORT_GPU_MEMORY_MIB="8000") == WorkerSettings(
        lanes=1, gpu_memory_mib=8000
    )


def test_an_empty_variable_is_none():
    assert read({"threads": 3}, TORCHPORT_THREADS="").threads == 3


def test_variables_of_others_are_ignored():
    assert read(None, TORCHPORT_PORT="x", THREADS="9", torchport_threads="9") == WorkerSettings()


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("threads", 1, 1024),
        ("computing", 0, 8),
        ("max_batch", 0, 65536),
        ("decoding", 0, 1024),
        ("lanes", 0, 2),
        ("cuda_graphs", 0, 1),
        ("gpu_memory_mib", 0, 1 << 24),
        ("jpeg_on_gpu", 0, 1),
    ],
)
def test_bounds_are_included(name, least, most):
    variable = f"TORCHPORT_{name.upper()}"
    for value in (least, most):
        assert getattr(read({name: value}), name) == value
        assert getattr(read(None, **{variable: str(value)}), name) == value
    for value in (least - 1, most + 1):
        with pytest.raises(LoadError, match=rf"torchport\.{name} must be a whole number from {least} to {most}"):
            read({name: value})
        with pytest.raises(
            LoadError, match=rf"{variable} must be a whole number from {least} to {most}, not '?{value}"
        ):
            read(None, **{variable: str(value)})


@pytest.mark.parametrize("value", ["two", "1.5", "-1", "+1", " 1", "1 ", "0x1", "1_0", "\u0661", "\u00b2", "9" * 5000])
def test_a_variable_that_is_no_number_is_named(value):
    with pytest.raises(LoadError, match=r"TORCHPORT_THREADS must be a whole number from 1 to 1024, not"):
        read(None, TORCHPORT_THREADS=value)


@pytest.mark.parametrize("value", ["2", 2.0, True, [1], {}])
def test_a_value_that_is_no_number_is_named(value):
    with pytest.raises(LoadError, match=r"model-config\.yaml\.torchport\.threads must be a whole number"):
        read({"threads": value})


def test_an_unknown_name_is_refused_with_the_one_that_was_meant():
    with pytest.raises(LoadError, match=r"torchport\.max_bacth is not a known field; did you mean 'max_batch'\?"):
        read({"max_bacth": 3})
    with pytest.raises(LoadError, match=r"torchport\.zzz is not a known field; the fields here are: threads, comp"):
        read({"zzz": 3})


@pytest.mark.parametrize("section", [1, "threads", [], {1: 2}])
def test_a_section_that_is_no_mapping_is_refused(section):
    with pytest.raises(LoadError, match=r"model-config\.yaml\.torchport must be a mapping"):
        read(section)
