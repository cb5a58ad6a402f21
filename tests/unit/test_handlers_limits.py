import pytest

from handlers.errors import TooLargeError
from handlers.limits import DEFAULT_MAX_ANSWER_BYTES, check_answer_size, max_answer_bytes


@pytest.fixture
def parent(tmp_path):
    """Describes a process as Linux does; returns a function that reads the limit from it."""

    def describe(
        text,
        command=("java", "org.pytorch.serve.ModelServer", "-f", "conf/c.properties"),
        environment=None,
        absent=False,
    ):
        folder = tmp_path / "4711"
        (folder / "cwd" / "conf").mkdir(parents=True)
        if not absent:
            (folder / "cwd" / "conf" / "c.properties").write_bytes(text.encode("latin-1"))
            (folder / "cwd" / "config.properties").write_bytes(b"max_response_size=77\n")
        (folder / "cmdline").write_bytes("\0".join([*command, ""]).encode())
        return max_answer_bytes(process=4711, processes=tmp_path, environment=environment or {})

    return describe


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("max_response_size=16777216\n", 16777216),
        ("a=b\n  max_response_size : 5 \nc=d", 5),
        ("max_response_size 5", 5),
        ("max_response_size=5\nmax_response_size=6", 6),
        ("#max_response_size=5\n", DEFAULT_MAX_ANSWER_BYTES),
        ("max_response_size=many\n", DEFAULT_MAX_ANSWER_BYTES),
        ("max_request_size=5\n", DEFAULT_MAX_ANSWER_BYTES),
        ("", DEFAULT_MAX_ANSWER_BYTES),
        ("comment=\xe9\nmax_response_size=5\n", 5),
    ],
)
def test_the_limit_is_what_the_server_s_configuration_says(parent, text, limit):
    assert parent(text) == limit


@pytest.mark.parametrize(("allowed", "limit"), [("true", 9), ("false", 5)])
def test_the_environment_counts_only_if_the_configuration_allows_it(parent, allowed, limit):
    text = f"max_response_size=5\nenable_envvars_config={allowed}\n"
    assert parent(text, environment={"TS_MAX_RESPONSE_SIZE": "9"}) == limit


def test_without_a_file_on_its_command_line_the_server_reads_the_usual_one(parent):
    assert parent("", command=("java", "org.pytorch.serve.ModelServer", "-s", "store")) == 77


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        (("pytest", "-f", "conf/c.properties"), False),
        (("java", "org.pytorch.serve.ModelServer", "-f", "conf/c.properties"), True),
        (("java", "org.pytorch.serve.ModelServer", "-f"), True),
        ((), False),
    ],
)
def test_otherwise_it_is_the_server_s_default(parent, command, absent):
    assert parent("max_response_size=5\n", command=command, absent=absent) == DEFAULT_MAX_ANSWER_BYTES


def test_under_pytest_it_is_the_default():
    assert max_answer_bytes() == DEFAULT_MAX_ANSWER_BYTES


def test_the_limit_itself_is_allowed():
    check_answer_size(b"1234", 4)
    with pytest.raises(TooLargeError, match=r"The answer has 5 bytes; the limit is 4; send fewer") as caught:
        check_answer_size(b"12345", 4)
    assert (caught.value.status, caught.value.code) == (413, "answer_too_large")
