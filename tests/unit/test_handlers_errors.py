"""Codes of errors are stable words: the documentation lists all of them, and tests ask for each."""

import ast
import re
from pathlib import Path

import pytest

from handlers import errors
from handlers.errors import MalformedError, RequestError, as_open_protocol

ROOT = Path(__file__).parents[2]
STATUS = {
    name: value.status
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, RequestError)
}
CODE = re.compile(r"[a-z]+(_[a-z0-9]+)+")
# What the frontend answers by itself; the integration tests ask for each with its status.
BY_FRONTEND = {(408, "upload_stalled"), (503, "overloaded"), (503, "stopping")}


def raised():
    """Codes by status, of every error that a handler makes, or the frontend before it."""
    found = set(BY_FRONTEND)
    for path in (ROOT / "handlers").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            status = STATUS.get(node.func.id, 500 if node.func.id == "defect" else None)
            codes = [constant.value for constant in ast.walk(node.args[0]) if isinstance(constant, ast.Constant)]
            if status is not None:
                found |= {(status, code) for code in codes if isinstance(code, str)}
    return found


def documented():
    page = (ROOT / "docs" / "requests.md").read_text(encoding="utf-8")
    limits = re.findall(r"(\d{3}) `([a-z0-9_]+)`", page)
    found = {(int(status), code) for status, code in limits}
    status = 0
    for row in re.findall(r"^\|(.*)\|$", page.partition("## Errors")[2], re.MULTILINE):
        first, codes, *_ = row.split("|")
        status = int(first) if first.strip().isdecimal() else status
        found |= {(status, code) for code in re.findall("`([a-z0-9_]+)`", codes)}
    return found


def test_the_documentation_lists_every_code_with_its_status():
    # Where the code is a variable, its two values are listed here.
    assert raised() | {(400, "not_booleans"), (400, "not_numbers")} == documented()


def test_the_codes_of_the_frontend_are_those_in_its_sources():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "deploy" / "frontend").glob("*.java")]
    named = {code for text in sources for code in re.findall(r'\\"code\\": \\"(\w+)\\"', text)}
    assert named == {code for _, code in BY_FRONTEND}


def test_codes_are_words():
    assert [code for _, code in raised() - BY_FRONTEND if not CODE.fullmatch(code)] == []


@pytest.mark.parametrize("code", sorted({code for _, code in documented()}))
def test_every_code_has_a_test(code):
    here = Path(__file__)
    paths = {*here.parent.glob("test_handlers_*.py"), *(ROOT / "tests" / "integration").glob("test_*.py")} - {here}
    tests = [path.read_text(encoding="utf-8") for path in paths]
    assert any(re.search(rf'"{code}[":]', text) for text in tests)


def test_an_error_is_an_object_or_a_string_by_its_request():
    error = MalformedError("wrong_body", "It is wrong.")
    own = {"error": {"code": "wrong_body", "message": "It is wrong."}}
    of_protocol = {"error": "wrong_body: It is wrong.", "code": "wrong_body"}
    assert error.document() == own
    assert error.document(open_protocol=True) == of_protocol
    assert error.document() == own
    with pytest.raises(MalformedError), as_open_protocol():
        raise error
    assert error.document() == of_protocol
