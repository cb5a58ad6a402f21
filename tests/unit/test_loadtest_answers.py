import json

import pytest

from loadtest.answers import CONNECTION_LOST, CONNECTION_REFUSED, TIMED_OUT, check_answer, judge_failure


def test_a_right_answer_has_no_fault():
    body = json.dumps({"label": "7", "probability": 0.9}).encode()
    assert check_answer(status=200, body=body, expected_label="7") is None


def test_without_an_expected_label_the_status_decides():
    assert check_answer(status=200, body=b"anything", expected_label=None) is None


@pytest.mark.parametrize(
    ("status", "body", "kind", "detail"),
    [
        (200, b'{"label": "3"}', "wrong answer", "label '3' instead of '7'"),
        (200, b'{"predictions": []}', "unreadable answer", "no label in: "),
        (200, b"<html>", "unreadable answer", "<html>"),
        (200, b"\xff\xfe", "unreadable answer", "no label in: "),
        (422, b'{"error": {"code": "x", "message": "too dark"}}', "HTTP 422", "too dark"),
        (404, b'{"code": 404, "type": "T", "message": "Model not found: x"}', "HTTP 404", "Model not found: x"),
        (500, b"", "HTTP 500", "(empty answer)"),
        (502, b"bad  \n gateway", "HTTP 502", "bad gateway"),
        (503, b'["busy"]', "HTTP 503", '["busy"]'),
        (503, b'{"error": "busy"}', "HTTP 503", '{"error": "busy"}'),
    ],
)
def test_a_fault_names_its_kind_and_what_happened(status, body, kind, detail):
    fault = check_answer(status=status, body=body, expected_label="7")
    assert fault.kind == kind
    assert detail in fault.detail


def test_a_long_body_is_cut():
    fault = check_answer(status=500, body=b"x" * 10_000, expected_label=None)
    assert len(fault.detail) < 250


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TimeoutError("slow"), TIMED_OUT),
        (ConnectionRefusedError("no"), CONNECTION_REFUSED),
        (ConnectionResetError("cut"), CONNECTION_LOST),
        (ValueError("half an answer"), CONNECTION_LOST),
    ],
)
def test_a_request_without_an_answer_names_the_cause(error, kind):
    fault = judge_failure(error)
    assert fault.kind == kind
    assert str(error) in fault.detail
