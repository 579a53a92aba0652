"""A teacher behind an address: what it is asked, what is repeated, what ends the command, and resuming."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from mlx_posttrain.convert.weights import convert
from mlx_posttrain.data import sources
from mlx_posttrain.errors import UserError
from mlx_posttrain.generation import server as module
from mlx_posttrain.generation import synthesize
from mlx_posttrain.generation.server import KEY, Server
from mlx_posttrain.generation.synthesize import Settings
from mlx_posttrain.models.export import export
from tests.helpers import cli, mlx_lm_server, read_jsonl, refused, run_recipe, write_jsonl


class Teacher(http.server.ThreadingHTTPServer):
    """Answers sums; ``reply(number of the request, body)`` may return (status, headers, text) instead."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.reply: Callable[[int, dict[str, Any]], Any] = lambda number, body: None
        self.busy = self.most = 0
        self.lock = threading.Lock()

    def handle_error(self, *args: Any) -> None:
        """A client that went away is no error here."""

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        question = body["messages"][-1]["content"]
        a, b = (int(word) for word in question.replace("?", "").split()[2::2])
        return completion(f"{a + b}")


class Handler(http.server.BaseHTTPRequestHandler):
    server: Teacher

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            return self.send(404, {}, "no such page")
        return self.send(200, {}, json.dumps({"data": [{"id": "sums"}, {"id": "poems"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.headers.append(dict(self.headers))
            number = len(self.server.asked)
            self.server.busy += 1
            self.server.most = max(self.server.most, self.server.busy)
        assert self.path == "/v1/chat/completions"
        try:
            found = self.server.reply(number, body)
        finally:
            with self.server.lock:
                self.server.busy -= 1
        if found is None:
            found = 200, {}, json.dumps(self.server.answer(body))
        elif found == "cut":
            self.close_connection = True
            return
        self.send(*found)

    def send(self, status: int, headers: dict[str, str], text: str) -> None:
        data = text.encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


def completion(text: str | None, ended: str = "stop", **message: str) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text, **message}, "finish_reason": ended}]}


@pytest.fixture
def teacher(monkeypatch) -> Iterator[Teacher]:
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setattr(module, "FIRST_WAIT", 0.002)
    found = Teacher()
    threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def sums(tmp_path) -> Path:
    rows = [{"question": f"What is {n} + {2 * n}?", "answer": str(3 * n)} for n in range(1, 7)]
    return write_jsonl(tmp_path / "sums.jsonl", rows)


def make(teacher: Teacher, sums: Path, output: Path, settings: Settings | None = None, **server: Any):
    asked = Server(teacher.url, "sums", **server)
    settings = settings or Settings(samples=2, keep=2, near=None)
    return synthesize.synthesize("sums", str(sums), output, settings, server=asked)


def test_questions_are_asked_as_chats_and_the_right_answers_are_kept(teacher, sums, tmp_path):
    teacher.reply = lambda number, body: (
        (200, {}, json.dumps(completion("7"))) if "is 2 +" in body["messages"][-1]["content"] else None
    )
    settings = Settings(
        samples=2, keep=1, near=None, temperature=0.6, top_p=0.9, max_tokens=33, system="Be brief.", seed=4
    )
    counts = make(teacher, sums, tmp_path / "out.jsonl", settings)
    written = read_jsonl(tmp_path / "out.jsonl")
    assert [r["response"] for r in written] == ["3", "9", "12", "15", "18"]
    assert (counts["written"], counts["kept"], counts["not needed"], counts["wrong"]) == (5, 5, 5, 2)
    first = next(b for b in teacher.asked if "is 3 +" in b["messages"][-1]["content"])
    assert first.pop("seed") >= 0 and first == {
        "model": "sums",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 3 + 6?"},
        ],
        "temperature": 0.6,
        "top_p": 0.9,
        "max_tokens": 33,
        "stream": False,
    }
    provenance = written[0]["provenance"]
    assert provenance["teacher"] == "sums" and provenance["url"] == teacher.url
    assert "weights" not in provenance and provenance["system"] == "Be brief."


def test_every_sample_has_its_own_seed_or_none(teacher, sums, tmp_path):
    make(teacher, sums, tmp_path / "a.jsonl", Settings(samples=3, seed=1))
    seeds = {b["seed"] for b in teacher.asked}
    assert len(seeds) == 18 and max(seeds) < 2**31
    teacher.asked.clear()
    make(teacher, sums, tmp_path / "b.jsonl", Settings(samples=3, seed=1))
    assert {b["seed"] for b in teacher.asked} == seeds
    teacher.asked.clear()
    make(teacher, sums, tmp_path / "c.jsonl", Settings(samples=3))
    assert not any("seed" in b for b in teacher.asked)


@pytest.mark.parametrize(
    "message",
    [
        completion("3", reasoning_content="1 + 2 = 3"),
        completion("3", reasoning="1 + 2 = 3"),
        completion("<think>\n1 + 2 = 3\n</think>\n3"),
        completion("\n\n3", reasoning="<think>1 + 2 = 3</think>"),
    ],
)
def test_a_thought_is_read_in_every_form_that_servers_send(teacher, sums, tmp_path, message):
    teacher.reply = lambda number, body: (200, {}, json.dumps(message))
    settings = Settings(samples=1, near=None, require_thought=True)
    make(teacher, sums, tmp_path / "out.jsonl", settings)
    (row,) = read_jsonl(tmp_path / "out.jsonl")  # of the one question whose sum is 3
    assert (row["thinking"], row["answer"]) == ("1 + 2 = 3", "3")


def test_answers_cut_off_and_thoughts_without_an_answer_are_left_out(teacher, sums, tmp_path):
    cut = completion("3", "length")
    thought_only = completion(None, reasoning="It is 3")
    teacher.reply = lambda number, body: (200, {}, json.dumps(cut if number % 2 else thought_only))
    counts = make(teacher, sums, tmp_path / "out.jsonl")
    assert (counts["not ended"], counts["wrong"], counts["written"]) == (6, 6, 0)


@pytest.mark.parametrize(
    "failure", [(429, {}, "slow down"), (500, {}, "<html>oops</html>"), (503, {}, ""), "cut"]
)
def test_what_may_pass_is_asked_again(teacher, sums, tmp_path, capfd, failure):
    """Every request but the first fails twice: the first shows that the server is there."""
    tries: dict[int, int] = {}

    def reply(number: int, body: dict[str, Any]) -> Any:
        with teacher.lock:
            tries[body["seed"]] = tries.get(body["seed"], 0) + 1
            return failure if number > 1 and tries[body["seed"]] <= 2 else None

    teacher.reply = reply
    counts = make(teacher, sums, tmp_path / "out.jsonl", Settings(samples=2, seed=0), in_flight=1)
    assert counts["kept"] == 6 and len(teacher.asked) == 1 + 3 * 11
    assert "waiting" in capfd.readouterr().err


def test_a_timeout_is_asked_again(teacher, sums, tmp_path, capfd):
    done = threading.Event()
    teacher.reply = lambda number, body: done.wait(5) and None if number == 2 else None
    counts = make(teacher, sums, tmp_path / "out.jsonl", timeout=0.2)
    done.set()
    assert counts["kept"] == 12 and len(teacher.asked) == 13
    assert "no answer within 0 s" in capfd.readouterr().err


def test_retry_after_is_kept_by_all_requests(teacher, sums, tmp_path):
    arrived: list[float] = []

    def reply(number: int, body: dict[str, Any]) -> Any:
        arrived.append(time.monotonic())
        return (429, {"Retry-After": "0.4"}, "{}") if number == 1 else None

    teacher.reply = reply
    make(teacher, sums, tmp_path / "out.jsonl", Settings(samples=1), in_flight=1)
    assert arrived[1] - arrived[0] >= 0.4
    assert module._retry_after({"Retry-After": formatdate(time.time() + 90)}) == pytest.approx(90, abs=3)
    assert module._retry_after({"Retry-After": "soon"}) is None and module._retry_after({}) is None


def test_a_long_wait_and_a_server_that_stays_broken_end_the_command(teacher, sums, tmp_path):
    teacher.reply = lambda number, body: (429, {"Retry-After": "86400"}, '{"error": {"message": "quota"}}')
    with pytest.raises(
        UserError, match=r"429 \(quota\), and asks to wait 86400 seconds.*what is done is kept"
    ):
        make(teacher, sums, tmp_path / "out.jsonl", in_flight=1)
    teacher.asked.clear()
    teacher.reply = lambda number, body: (502, {}, '{"error": "no model"}')
    with pytest.raises(UserError, match=r"HTTP 502 \(no model\), 8 times in a row"):
        make(teacher, sums, tmp_path / "out.jsonl", in_flight=1)
    assert len(teacher.asked) == module.TRIES


def test_no_more_requests_are_in_flight_than_allowed(teacher, sums, tmp_path):
    teacher.reply = lambda number, body: time.sleep(0.02)
    make(teacher, sums, tmp_path / "out.jsonl", Settings(samples=4), in_flight=3)
    assert teacher.most == 3 and len(teacher.asked) == 24


def test_rows_that_are_made_are_not_asked_again(teacher, sums, tmp_path):
    """Answers come in any order; what is on the disk when the command is killed stays and is not repeated."""
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    teacher.reply = lambda number, body: time.sleep(0.03 if number % 3 == 0 else 0)
    make(teacher, sums, whole)
    teacher.asked.clear()
    broken = threading.Event()

    def reply(number: int, body: dict[str, Any]) -> Any:
        if "is 4 +" in body["messages"][-1]["content"]:
            broken.set()
        return (401, {}, "") if broken.is_set() else None

    teacher.reply = reply
    with pytest.raises(UserError, match="401"):
        make(teacher, sums, cut, in_flight=1)
    assert [r["provenance"]["question"] for r in read_jsonl(cut)] == [0, 0, 1, 1, 2, 2]
    teacher.asked.clear()
    teacher.reply = lambda number, body: None
    make(teacher, sums, cut)
    assert len(teacher.asked) == 6 and read_jsonl(cut) == read_jsonl(whole)
    assert not any("is 1 +" in b["messages"][-1]["content"] for b in teacher.asked)
    make(teacher, sums, cut)
    assert len(teacher.asked) == 6


def test_a_question_that_the_server_does_not_take_is_counted(teacher, sums, tmp_path, capfd):
    too_long = (400, {}, '{"error": {"message": "context length exceeded"}}')
    teacher.reply = lambda number, body: too_long if "is 2 +" in body["messages"][-1]["content"] else None
    counts = make(teacher, sums, tmp_path / "out.jsonl")
    assert (counts["refused"], counts["kept"]) == (2, 10)
    assert "question 2: " in capfd.readouterr().err
    teacher.reply = lambda number, body: too_long
    with pytest.raises(UserError, match=r"first question: HTTP 400 \(context length exceeded\)"):
        make(teacher, sums, tmp_path / "none.jsonl")


def cli_words(sums: Path, output: Path, url: str, *more: str) -> tuple[str, ...]:
    teacher = ("--teacher", "sums", "--teacher-url", url, "--prompts", str(sums))
    return ("synthesize", str(output), *teacher, "--samples", "1", *more)


def test_the_key_comes_from_the_environment_and_goes_into_no_file(teacher, sums, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    assert cli(*cli_words(sums, out, teacher.url)) == 0
    assert not any("Authorization" in h for h in teacher.headers)
    out.unlink()
    monkeypatch.setenv(KEY, "sk-secret")
    assert cli(*cli_words(sums, out, f"{teacher.url}/chat/completions/")) == 0
    assert {h["Authorization"] for h in teacher.headers[6:]} == {"Bearer sk-secret"}
    assert not any("sk-secret" in path.read_text() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        ((401, {}, '{"error": {"message": "no key"}}'), f"HTTP 401 (no key): put its key into {KEY}"),
        ((404, {}, '{"error": "no"}'), "has no model 'sums', HTTP 404 (no): correct --teacher (there are p"),
        ((200, {}, "<html>Hello</html>"), "answered with no JSON ('<html>Hello</html>')"),
        ((200, {}, '{"answer": 5}'), "answered with JSON that has no choices[0].message"),
        ((200, {}, "[" * 100_000), "answered with no JSON"),
        ((307, {"Location": "http://elsewhere.example/v1"}, ""), "sends us to http://elsewhere.example/v1"),
        ((418, {}, "teapot"), "answered HTTP 418 (teapot)"),
    ],
)  # fmt: skip
def test_what_a_server_can_answer_wrongly_is_one_line(teacher, sums, tmp_path, capfd, reply, line):
    teacher.reply = lambda number, body: reply
    assert line in refused(capfd, *cli_words(sums, tmp_path / "out.jsonl", teacher.url))


def test_addresses_that_lead_nowhere_are_one_line(sums, tmp_path, capfd, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    out = tmp_path / "out.jsonl"
    assert f"nothing answers at {url}" in refused(capfd, *cli_words(sums, out, url))
    for wrong in ("localhost:8080", "ftp://localhost/v1", "http://", "http://localhost:99999", "file:///etc"):
        assert "no address of a server" in refused(capfd, *cli_words(sums, out, wrong))
    for wrong in ("http://me:sk-1@localhost/v1", "http://localhost/v1?key=sk-1"):
        line = refused(capfd, *cli_words(sums, out, wrong))
        assert "without a user, a key or a query" in line and "sk-1" not in line
    assert "its model's own" in refused(capfd, *cli_words(sums, out, url, "--template", "chat"))
    monkeypatch.setenv(KEY, "sk\nsecret")
    line = refused(capfd, *cli_words(sums, out, url))
    assert "cannot be sent" in line and "secret" not in line


def test_a_local_server_is_asked_past_a_proxy(teacher, sums, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert make(teacher, sums, tmp_path / "out.jsonl")["kept"] == 12


@pytest.mark.exhaustive
def test_mlx_lms_own_server_is_a_teacher_like_the_model_itself(tmp_path, capfd):
    """The same greedy answers, kept by the same rules, as from the run that was exported."""
    pytest.importorskip("mlx_lm")
    base, run, out = tmp_path / "base", tmp_path / "run", tmp_path / "export"
    convert("tiny", base, to="hf", dtype="float32")
    steps = ["train.steps=12", "train.batch_size=8", "train.lr=1e-3", "data.template=question"]
    short = ["data.limit=200", "data.max_length=96", "data.eval_limit=4", "sample.count=0"]
    run_recipe("01_sft", f"model={base}", "data.source=embedded/tasks", f"output={run}", *steps, *short)
    export(run, out, "mlx-lm")
    rule = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    asked = sources.load_rows("embedded/tasks", split="train", limit=10)
    prompts = str(write_jsonl(tmp_path / "q.jsonl", [{"prompt": r["instruction"], **rule} for r in asked]))
    greedy = Settings(samples=1, temperature=0.0, max_tokens=32, seed=0)
    local = synthesize.synthesize(str(run), prompts, tmp_path / "local.jsonl", greedy, engine="mlx")
    with mlx_lm_server(out) as url:
        server = Server(url, "default_model")
        remote = synthesize.synthesize(
            "default_model", prompts, tmp_path / "remote.jsonl", greedy, server=server
        )
        line = refused(capfd, *cli_words(Path(prompts), tmp_path / "none.jsonl", url))
    assert remote == local and local["kept"] > 2
    answers = [
        [(r["question"], r["response"]) for r in read_jsonl(tmp_path / f"{kind}.jsonl")]
        for kind in ("local", "remote")
    ]
    assert answers[0] == answers[1]
    assert "has no model 'sums', HTTP 404" in line and "Traceback" not in line
