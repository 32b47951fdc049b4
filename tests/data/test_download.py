"""`metaheed data download` against a local server with faults, through the command line as a user runs it."""

import fcntl
import hashlib
import http.server
import re
import resource
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from metaheed.config import PRESETS
from metaheed.data import load_dataset
from metaheed.data.reading import download, transfer
from metaheed.data.reading.download import PUBLISHED
from metaheed.data.reading.transfer import PublishedFile
from tests.conftest import Run
from tests.documented import assert_each_has_a_case, assert_seen, rows
from tests.test_training import environment

CONTENT = np.random.default_rng(0).bytes(3_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in to\n continue</title></head><body>Quota</body></html>"


class Server(http.server.ThreadingHTTPServer):
    """/WAY/NAME is answered in that way; every request is noted as (way, what it asked for)."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        super().__init__(address, Handler)
        self.seen: list[tuple[str, str | None]] = []
        self.if_range: list[str | None] = []
        self.release = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, way: str, scheme: str = "http") -> str:
        return f"{scheme}://127.0.0.1:{self.server_port}/{way}/file.bin"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are part of these tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        way, asked = self.path.split("/")[1], self.headers.get("Range")
        self.server.seen.append((way, asked))
        self.server.if_range.append(self.headers.get("If-Range"))
        times = sum(seen == way for seen, _ in self.server.seen)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        whole = CONTENT
        match way:
            case "missing":
                return self.send_error(404)
            case "denied":
                return self.send_error(403)
            case "busy" if times == 1:
                self.send_response(503)
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            case "down":
                return self.send_error(500)
            case "page":
                return self.answer(200, PAGE, kind="text/html; charset=utf-8")
            case "hidden-page":
                return self.answer(200, b"\n" + PAGE)
            case "wrong":
                whole = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
            case "no-range":
                start = 0
            case "elsewhere":
                return self.redirect(self.server.url("good"))
            case "round":
                return self.redirect(self.server.url("round"))
            case "to-http":
                return self.redirect("http://127.0.0.1:9/file.bin")
            case "claims-much":
                return self.answer(200, b"x", length=1 << 60)
            case "changed":  # another version since the first request
                start = start if self.headers.get("If-Range") == f'"{times}"' else 0
                return self.answer(206 if start else 200, CONTENT[start:], start, cut=500_000 * times, tag=f'"{times}"')
            case "misplaced" if start:
                return self.answer(206, CONTENT, 0)
        if start >= len(whole):
            return self.send_error(416)
        body, status = whole[start:], 206 if start else 200
        if way == "breaks":
            return self.answer(status, body, start, cut=400_000)
        if way == "dies":
            return self.answer(status, body, start, cut=0 if start else 1_000_000)
        if way == "hangs" and times == 1:
            return self.answer(status, body, start, cut=100_000, hang=True)
        if way == "slow":
            return self.answer(status, body, start, cut=200_000, hang=True)
        if way == "chunked":
            return self.chunks(body)
        return self.answer(status, body, start)

    def redirect(self, to: str) -> None:
        self.send_response(302)
        self.send_header("Location", to)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(
        self,
        status: int,
        body: bytes,
        start: int = 0,
        *,
        kind: str = "application/octet-stream",
        length: int | None = None,
        cut: int | None = None,
        hang: bool = False,
        tag: str = '"one"',
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("ETag", tag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{start + len(body)}")
        self.end_headers()
        self.wfile.write(body[:cut])
        self.wfile.flush()
        if hang:
            self.server.release.wait(20)

    def chunks(self, body: bytes) -> None:
        self.protocol_version = "HTTP/1.1"
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for first in range(0, len(body), 1_000_000):
            part = body[first : first + 1_000_000]
            self.wfile.write(b"%x\r\n" % len(part) + part + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(transfer, "_WAIT", 0.001)
    monkeypatch.setattr(transfer, "_TIMEOUT", 1.0)
    server = Server()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


Fetch = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fetch(server: Server, metaheed: Run, monkeypatch: pytest.MonkeyPatch, in_folder: Path) -> Fetch:
    """The command, given the ways of the mirrors; the file goes to data/sub/file.bin."""

    def run(*ways: str, urls: tuple[str, ...] = ()) -> tuple[int, str, str]:
        urls = urls or tuple(server.url(way) for way in ways)
        monkeypatch.setitem(PUBLISHED, "omniglot", (PublishedFile("sub/file.bin", MD5, urls),))
        return metaheed("data", "download", "omniglot", "--data-root", "data")

    return run


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_download(fetch: Fetch, server: Server, in_folder: Path) -> None:
    status, out, err = fetch("good")
    assert (status, out) == (0, "data/sub/file.bin\n")
    assert (in_folder / "data/sub/file.bin").read_bytes() == CONTENT
    assert "file.bin: 0.0 of 3.0 MB" in err
    assert files(in_folder / "data") == ["sub", "sub/file.bin"]
    status, out, err = fetch("good")
    assert (status, out) == (0, "data/sub/file.bin\n")
    assert "data/sub/file.bin is there already, with the published content" in err
    assert len(server.seen) == 1, "nothing is asked for again"


@pytest.mark.parametrize("way", ["busy", "no-range", "elsewhere", "chunked", "breaks", "changed", "hangs", "dies"])
def test_download_from_a_server_with_faults(way: str, fetch: Fetch, server: Server, in_folder: Path) -> None:
    status, _, err = fetch(way, "good")
    assert status == 0, err
    assert (in_folder / "data/sub/file.bin").read_bytes() == CONTENT
    assert files(in_folder / "data") == ["sub", "sub/file.bin"]
    asked = [range for seen, range in server.seen if seen == way]
    match way:
        case "breaks":
            assert asked == [None, *(f"bytes={k * 400_000}-" for k in range(1, 8))], "each goes on where the last broke"
            assert server.if_range == [None, *['"one"'] * 7]
        case "changed":
            assert asked == [None, *(f"bytes={k * 500_000}-" for k in range(1, 6))], "started anew, and broken later"
        case "hangs":
            assert asked == [None, "bytes=100000-"]
        case "dies":
            assert asked == [None, *["bytes=1000000-"] * 3]
            assert server.seen[-1] == ("good", "bytes=1000000-"), "the next mirror goes on"
            assert "failed 4 times in a row" in err


@pytest.mark.parametrize("way", ["missing", "denied", "down", "page", "hidden-page", "wrong", "round"])
def test_the_next_mirror_is_tried(way: str, fetch: Fetch, server: Server, in_folder: Path) -> None:
    status, _, err = fetch(way, "good")
    assert status == 0, err
    assert server.url(way) in err, "it says why the first was passed over"
    assert (in_folder / "data/sub/file.bin").read_bytes() == CONTENT
    assert server.seen[-1] == ("good", None), "nothing of what the first gave is kept"
    if way in ("missing", "denied", "page", "wrong"):
        assert len(server.seen) == 2, "what cannot get better is not asked for again"


def test_a_part_is_continued(fetch: Fetch, server: Server, in_folder: Path) -> None:
    part = in_folder / "data/sub/file.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:1_234_567])
    assert fetch("good")[0] == 0
    assert server.seen == [("good", "bytes=1234567-")]
    assert files(in_folder / "data") == ["sub", "sub/file.bin"]


@pytest.mark.parametrize("way", ["good", "no-range", "misplaced"])
@pytest.mark.parametrize("left", [b"x" * 1000, CONTENT + b"x" * 1000, CONTENT[:-1] + b"?"])
def test_a_part_of_something_else(left: bytes, way: str, fetch: Fetch, in_folder: Path) -> None:
    part = in_folder / "data/sub/file.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(left)
    assert fetch(way)[0] == 0
    assert (in_folder / "data/sub/file.bin").read_bytes() == CONTENT
    assert not part.exists()


def test_a_whole_part_needs_no_server(fetch: Fetch, server: Server, in_folder: Path) -> None:
    part = in_folder / "data/sub/file.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT)
    assert fetch("missing")[0] == 0
    assert server.seen == []
    assert files(in_folder / "data") == ["sub", "sub/file.bin"]


def test_a_root_that_is_the_folder_itself(fetch: Fetch, server: Server, in_folder: Path) -> None:
    (in_folder / "data").mkdir()
    (in_folder / "data/file.bin").write_bytes(CONTENT)
    assert fetch("good")[:2] == (0, "data/file.bin\n")
    assert server.seen == []


def test_an_unpacked_folder_will_do(metaheed: Run, in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = PublishedFile("a.tar.gz", MD5, (), {"a/one": hashlib.md5(b"1").hexdigest(), "a/two": MD5})
    monkeypatch.setitem(PUBLISHED, "cifar-fs", (file,))
    (in_folder / "a").mkdir()
    (in_folder / "a/one").write_bytes(b"1")
    assert metaheed("data", "download", "cifar-fs", "--data-root", ".")[0] == 1, "one of two is not all"
    (in_folder / "a/two").write_bytes(CONTENT)
    for root in (".", "a"):
        assert metaheed("data", "download", "cifar-fs", "--data-root", root)[:2] == (0, "a\n")
    (in_folder / "a/two").write_bytes(b"?")
    assert "a/two is there already, but its md5 is" in metaheed("data", "download", "cifar-fs", "--data-root", ".")[2]


def test_failure_leaves_nothing(fetch: Fetch, in_folder: Path) -> None:
    status, out, err = fetch("missing", "page", "wrong")
    assert (status, out) == (1, "")
    for text in ("answers 404 Not Found", "'Sign in to continue'", f"published one is {MD5}", "put it at data/sub/"):
        assert text in err.splitlines()[-1], "the error says what each mirror did"
    assert files(in_folder) == []


def test_failure_keeps_what_has_come(fetch: Fetch, in_folder: Path) -> None:
    status, _, err = fetch("dies", "missing")
    assert status == 1
    assert "1000000 bytes are kept in data/sub/file.bin.part" in err
    assert files(in_folder / "data") == ["sub", "sub/file.bin.part"]
    assert fetch("good")[0] == 0
    assert (in_folder / "data/sub/file.bin").read_bytes() == CONTENT


SCRIPT = """
import sys
from metaheed.cli.entry import main
from metaheed.data.reading import download
download.PUBLISHED["omniglot"] = (download.PublishedFile("sub/file.bin", sys.argv[1], tuple(sys.argv[2:])),)
sys.exit(main(["data", "download", "omniglot", "--data-root", "data"]))
"""


def start(folder: Path, *urls: str, **options: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SCRIPT, MD5, *urls]
    pipe = subprocess.PIPE
    # A shell's background jobs ignore SIGINT, and so would what they start.
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return subprocess.Popen(command, cwd=folder, env=environment(), stdout=pipe, stderr=pipe, text=True, **options)


def waiting_for_bytes(part: Path, process: "subprocess.Popen[str]", count: int) -> None:
    for _ in range(2400):
        if part.exists() and part.stat().st_size >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("nothing came")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_only_the_part(number: signal.Signals, server: Server, in_folder: Path, fetch: Fetch) -> None:
    process = start(in_folder, server.url("slow"))
    waiting_for_bytes(in_folder / "data/sub/file.bin.part", process, 200_000)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Traceback" not in out + err
    assert files(in_folder / "data") == ["sub", "sub/file.bin.part"]
    assert fetch("good")[0] == 0
    assert server.seen[-1] == ("good", "bytes=200000-")


def test_a_disk_that_fills_up(server: Server, in_folder: Path, fetch: Fetch) -> None:
    limit = 1_000_000
    process = start(
        in_folder,
        server.url("good"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: cannot write data/sub/file.bin.part" in err
    assert files(in_folder / "data") == ["sub", "sub/file.bin.part"], "kept, to go on when there is room"
    assert len(server.seen) == 1, "another mirror would not help"
    assert fetch("good")[0] == 0
    assert server.seen[-1] == ("good", "bytes=1000000-")


def test_two_at_once(server: Server, in_folder: Path, fetch: Fetch) -> None:
    first = start(in_folder, server.url("slow"))
    waiting_for_bytes(in_folder / "data/sub/file.bin.part", first, 200_000)
    status, _, err = fetch("good")
    assert (status, "file.bin.part is being downloaded by another process" in err) == (1, True)
    first.kill()
    first.communicate()
    assert fetch("good")[0] == 0, "the lock went with its holder"


def test_https_with_an_unknown_certificate_and_a_redirect_away(
    server: Server, in_folder: Path, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = self_signed(in_folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    urls = (server.url("good", "https"),)
    status, _, err = fetch(urls=urls)
    assert (status, "has a certificate that is not trusted here (self" in err) == (1, True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    status, _, err = fetch(urls=(server.url("to-http", "https"),))
    assert (status, "redirects to http://127.0.0.1:9/file.bin, which is not HTTPS" in err) == (1, True)
    assert fetch(urls=urls)[0] == 0


def self_signed(folder: Path) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not at hand")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    extension = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(certificate), "-keyout", str(key)]
    subprocess.run([*command, *extension], check=True, capture_output=True)
    return certificate, key


def test_the_built_in_list() -> None:
    published = [file for of_set in PUBLISHED.values() for file in of_set]
    assert len({file.md5 for file in published}) == 3
    for file in published:
        assert re.fullmatch("[0-9a-f]{32}", file.md5)
        assert len(file.urls) >= 2
        assert len({*file.urls}) == len(file.urls)
        assert all(re.fullmatch(r"https://[\w./~-]+/" + re.escape(Path(file.path).name), url) for url in file.urls)
    assert {"glyphs", *PRESETS} <= {*PUBLISHED, *download.BY_HAND}, "each data set is fetched or explained"


def test_readers_find_what_was_downloaded(
    metaheed: Run, server: Server, omniglot_zips: Path, in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same paths, other md5s: those of small files in the published format."""
    small = []
    for file in PUBLISHED["omniglot"]:
        content = (omniglot_zips / Path(file.path).name).read_bytes()
        monkeypatch.setattr(sys.modules[__name__], "CONTENT", content)
        small.append(file._replace(md5=hashlib.md5(content).hexdigest(), urls=(server.url("good"),)))
        monkeypatch.setitem(PUBLISHED, "omniglot", tuple(small))
        assert metaheed("data", "download", "omniglot", "--data-root", "mine")[0] == 0
    fetched = load_dataset("omniglot", in_folder / "mine")
    assert fetched.split("test").fingerprint == load_dataset("omniglot", omniglot_zips).split("test").fingerprint


def _unknown(t: SimpleNamespace) -> str:
    return str(t.metaheed("data", "download", "omniglt")[2])


def _by_hand(data: str) -> Callable[[SimpleNamespace], str]:
    def case(t: SimpleNamespace) -> str:
        status, out, err = t.metaheed("data", "download", data, "--data-root", "mine")
        assert (status, out) == (1, "")
        for text in ("https://image-net.org/", "https://github.com/renmengye/few-shot-ssl-public", "mine/" + data):
            assert text in err
        assert re.search(r"(mini-imagenet-cache-val\.pkl|val_images_png\.pkl)", err)
        if data == "tieredimagenet":  # too large to be used as it is
            assert "metaheed data prepare tieredimagenet --from mine\n" in err
        return str(err)

    return case


def _mirror(*ways: str) -> Callable[[SimpleNamespace], str]:
    def case(t: SimpleNamespace) -> str:
        status, out, err = t.fetch(*ways)
        assert (status, out) == (1, "")
        return str(err)

    return case


def _no_network(t: SimpleNamespace) -> str:
    return str(t.fetch(urls=("https://nowhere.invalid/file.bin",))[2])


def _endless(t: SimpleNamespace) -> str:
    t.monkeypatch.setattr(transfer, "_LARGEST", 1_000_000)
    return str(t.fetch("good")[2])


def _no_room(t: SimpleNamespace) -> str:
    (t.folder / "data/sub").mkdir(parents=True)
    (t.folder / "data/sub/file.bin.part").write_bytes(CONTENT[:100])
    status, _, err = t.fetch("claims-much", "good")
    assert status == 1
    return str(err)


def _not_writable(t: SimpleNamespace) -> str:
    (t.folder / "data").mkdir()
    (t.folder / "data/sub").write_text("a file where the folder should be")
    return str(t.fetch("good")[2])


def _locked(t: SimpleNamespace) -> str:
    (t.folder / "data/sub").mkdir(parents=True)
    with (t.folder / "data/sub/file.bin.part").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        return str(t.fetch("good")[2])


def _other_file(t: SimpleNamespace) -> str:
    (t.folder / "data/sub").mkdir(parents=True)
    (t.folder / "data/sub/file.bin").write_bytes(b"repacked")
    err = t.fetch("good")[2]
    assert (t.folder / "data/sub/file.bin").read_bytes() == b"repacked", "the user's files are not deleted"
    return str(err)


def _https(message: str) -> Callable[[SimpleNamespace], str]:
    def case(t: SimpleNamespace) -> str:
        """Without a certificate at hand; test_https_with_an_unknown_certificate… does the same over the wire."""

        def refuse(*arguments: object) -> None:
            if message == "redirect":
                handler = transfer._Redirects()
                request = urllib.request.Request("https://a.invalid/file.bin")
                handler.redirect_request(request, None, 302, "Found", {}, "http://b.invalid/file.bin")
            error = ssl.SSLCertVerificationError(1, "certificate verify failed")
            error.verify_message = "self-signed certificate"
            raise urllib.error.URLError(error)

        t.monkeypatch.setattr(urllib.request.OpenerDirector, "open", lambda *a, **k: refuse())
        return str(t.fetch(urls=("https://a.invalid/file.bin",))[2])

    return case


CASES: dict[str, Callable[[SimpleNamespace], str]] = {
    "unknown data set to download …: did you mean …": _unknown,
    "miniimagenet cannot be downloaded for you: …": _by_hand("miniimagenet"),
    "tieredimagenet cannot be downloaded for you: …": _by_hand("tieredimagenet"),
    "… could not be downloaded: …": _mirror("missing", "missing"),
    "… answers 404 …": _mirror("missing"),
    "… answers with a web page titled … instead of the file: …": _mirror("hidden-page"),
    "… gave a file with md5 …, but the published one is …": _mirror("wrong"),
    "… failed 4 times in a row (…)": _mirror("down"),
    "… cannot be found (…): is there a network, or a proxy to set?": _no_network,
    "… has a certificate that is not trusted here (…)": _https("certificate"),
    "… redirects to …, which is not HTTPS": _https("redirect"),
    "… sends more than …, which no published file has": _endless,
    "no room for …: … are still to be downloaded, but … has only … free. …": _no_room,
    "cannot write …: …. Make room or grant permission there …": _not_writable,
    "… is being downloaded by another process: …": _locked,
    "… is there already, but its md5 is … and the published file's …. …": _other_file,
}


@pytest.mark.parametrize("row", rows("Downloading"))
def test_documented_error(
    row: str, fetch: Fetch, metaheed: Run, in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_seen(
        row, CASES[row](SimpleNamespace(fetch=fetch, metaheed=metaheed, folder=in_folder, monkeypatch=monkeypatch))
    )


def test_each_error_is_documented() -> None:
    assert_each_has_a_case("Downloading", CASES)
