"""The sandbox against programs that mean harm, by accident or by design, and its refusal where it cannot shut them in.

Each hostile program is a case of its own, and chosen so that it breaks nothing even where the sandbox is broken: it
probes (signal 0, a folder that is not empty, bombs with an end), because one day somebody takes the protection out to
see these tests fail. Where this machine allows no namespaces, the same cases test that nothing is
run at all, and then show as skipped with that reason.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tinylora.errors import UserError
from tinylora.tasks.sandbox import run as sandbox
from tinylora.tasks.sandbox.child import RUN, SYSCALLS, VALUE, encode
from tinylora.tasks.sandbox.run import Outcome, read_test, run_python, same

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux'; test_refused_* are elsewhere")
REFUSAL = "namespaces of its own, and this machine does not allow that .*unsafe_without_namespaces = true"
ROOT = Path(__file__).parents[2]


def isolation() -> str:
    """Why not; empty where it works."""
    try:
        sandbox.check_isolation()
    except UserError as error:
        return str(error)
    return ""


def shut_in(code: str, *tests: str, **options: object) -> Outcome:
    """`run_python`, or the test that it refuses."""
    why_not = isolation()
    if why_not:
        with pytest.raises(UserError, match=REFUSAL):
            run_python(code, tests, **options)
        pytest.skip(f"no namespaces here; tested that the code is refused instead ({why_not[:150]})")
    return run_python(code, tests, **options)


def leftovers() -> list[str]:
    """Processes of this checkout's sandbox that are there, zombies too, and were not before the test."""
    return [process for process in processes() if process.split()[0] not in BEFORE]


BEFORE: set[str] = set()


def processes() -> list[str]:
    """The sandbox's processes, but those below another worker of this test run, whose tests grade replies meanwhile."""
    found, parents = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        parents[folder.name] = parent
        if sandbox.sandbox_child.__file__ in command or (state == "Z" and parent == str(os.getpid())):
            found[folder.name] = f"{folder.name} {state} {command}"

    def of_another_worker(process: str) -> bool:  # what is left behind has the first process as parent, or ours
        while process in parents and process != str(os.getpid()):
            process = parents[process]
            if process == str(os.getppid()) and "PYTEST_XDIST_WORKER" in os.environ:
                return True
        return False

    return [line for process, line in found.items() if not of_another_worker(process)]


def gone(seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while leftovers() and time.monotonic() < end:
        time.sleep(0.02)
    return not leftovers()


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """After every test: no process, no folder, no file where programs may write."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    BEFORE.update(process.split()[0] for process in processes())
    yield
    assert gone(), leftovers()
    assert list(folder.iterdir()) == []


# --- attempts that must fail: f() says what came of it, and the test, which the code cannot forge, wants "refused" ---

ATTEMPT = """
import os, sys
def f():
    try:
        got = attempt()
    except (OSError, RuntimeError, ImportError) as error:
        return "refused"
    return repr(got)
"""
READ_ONLY = """
def read_only(call):
    try: call()
    except OSError as error:
        if error.errno == 30: raise
        raise ValueError(error)
"""
OTHER = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
CHECKED = """
def checked(result):
    if result == -1:
        raise OSError(ctypes.get_errno(), "")
    return result
"""
ATTEMPTS = {
    "fork": "attempt = os.fork",
    "fork bomb": "def attempt(): return [os.fork() for _ in range(6)]",
    "spawn": "def attempt():\n    import subprocess; return subprocess.run([sys.executable, '-c', 'pass'])",
    "exec": "def attempt(): os.execv(sys.executable, [sys.executable])",
    "system": "def attempt():\n    if os.system('true'): raise OSError",
    "multiprocessing": "def attempt():\n    import multiprocessing; multiprocessing.Process(target=print).start()",
    "thread": "def attempt():\n    import threading; threading.Thread(target=print).start()",
    "threads bomb": "def attempt():\n    import threading, time\n"
    "    for _ in range(500): threading.Thread(target=time.sleep, args=(9,)).start()",
    "internet socket": "def attempt():\n    import socket; return socket.socket()",
    "unix socket": "def attempt():\n    import socket; return socket.socket(socket.AF_UNIX)",
    "netlink socket": "def attempt():\n    import socket; return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "connect": "def attempt():\n    import socket; return socket.create_connection(('127.0.0.1', PORT), 1)",
    "name lookup": "def attempt():\n    import socket; return socket.getaddrinfo('example.org', 80)",
    "download": "def attempt():\n    import urllib.request; return urllib.request.urlopen('http://example.org')",
    "read passwords": "def attempt(): return open('/etc/passwd').read()",
    "read the environment of others": "def attempt(): return open('/proc/self/environ').read()",
    "list processes": "def attempt(): return os.listdir('/proc')",
    "list home": "def attempt(): return os.listdir(os.path.expanduser('~USER'))",
    "read a secret": "def attempt(): return open('SECRET').read()",
    "write beside a secret": "def attempt(): return open('SECRET.new', 'w')",
    "delete a secret": "def attempt(): os.remove('SECRET')",
    "write the root": "def attempt(): return open('/new', 'w')",
    "write the library": "def attempt(): return open(os.__file__, 'r+')",
    "delete the library": READ_ONLY
    + "def attempt(): read_only(lambda: os.rmdir(os.path.dirname(os.__file__) + '/json'))",
    "delete system libraries": READ_ONLY + "def attempt(): read_only(lambda: os.rmdir('/usr/lib'))",
    "write what is mounted": "def attempt():\n"
    "    places = ['/', '/usr/lib', os.path.dirname(os.__file__)]\n"
    "    if all(os.statvfs(place).f_flag & os.ST_RDONLY for place in places): raise OSError",
    "devices": "def attempt(): return os.listdir('/dev')",
    "make a device": "def attempt():\n    import stat; os.mknod('/tmp/null', stat.S_IFBLK | 0o666, os.makedev(254, 0))",
    # root owns /dev/null, so it could take it from everybody through a descriptor from before it was shut in
    "rights of what it inherits": READ_ONLY + "def attempt():\n    import stat\n"
    "    for fd in (0, 1, 2): read_only(lambda: os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode)))",
    "owner of what it inherits": READ_ONLY + "def attempt(): read_only(lambda: os.fchown(1, os.getuid(), os.getgid()))",
    "times of what it inherits": READ_ONLY + "def attempt(): read_only(lambda: os.utime(0))",
    "big file": "def attempt(): open('big', 'wb').write(bytes(2 << 20))",
    "sparse file": "def attempt(): open('big', 'wb').truncate(1 << 30)",
    "many files": "def attempt():\n    for i in range(2000): open(f'{i}', 'wb').write(b'1')",
    "fill the folder": "def attempt():\n    for i in range(40): open(f'{i}', 'wb').write(bytes(1 << 20))",
    "many descriptors": "def attempt(): return [os.dup(1) for _ in range(200)]",
    "more limits": "def attempt():\n    import resource\n"
    "    try: resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))\n"
    "    except ValueError: raise OSError",
    "become another user": "def attempt(): os.setuid(12345)",
    "change root": "def attempt(): os.chroot('/tmp')",
    "reach other processes": "def attempt(): os.kill(-1, 0)",
    "kill the parent": "def attempt():\n    if os.getppid(): return os.kill(os.getppid(), 9)\n    raise OSError",
    "shared memory": "def attempt():\n    from multiprocessing import shared_memory\n"
    "    return shared_memory.SharedMemory(create=True, size=1 << 30)",
    "memory file": "def attempt(): return os.memfd_create('x')",
    "mount": OTHER + CHECKED + "def attempt(): return checked(libc.mount(b'x', b'/tmp', b'tmpfs', 0, None))",
    "unmount": OTHER + CHECKED + "def attempt(): return checked(libc.umount2(b'/tmp', 2))",
    "remount": OTHER + CHECKED + "def attempt(): return checked(libc.mount(b'', b'/', None, 32, None))",
    "user namespace": OTHER + CHECKED + "def attempt(): return checked(libc.unshare(0x10000000))",
    "trace": OTHER + CHECKED + "def attempt(): return checked(libc.ptrace(0, 0, None, None))",
    "outlive the parent": OTHER + CHECKED + "def attempt(): return checked(libc.prctl(1, 0, 0, 0, 0))",
    "own session": "attempt = os.setsid",
    "32-bit system call": OTHER + "import mmap\ndef attempt():\n"
    "    # mov eax, 20 (getpid of i386); int 0x80; ret\n"
    "    page = mmap.mmap(-1, 4096, prot=7); page.write(bytes([0xb8, 20, 0, 0, 0, 0xcd, 0x80, 0xc3]))\n"
    "    at = ctypes.addressof(ctypes.c_char.from_buffer(page))\n"
    "    if os.uname().machine != 'x86_64' or ctypes.CFUNCTYPE(ctypes.c_int)(at)() < 0: raise OSError",
}


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret"
    path.write_text("42")
    return path


@pytest.mark.parametrize("name", ATTEMPTS)
def test_attempt_is_refused(name, secret):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        code = ATTEMPTS[name].replace("SECRET", str(secret)).replace("PORT", port)
        code = code.replace("~USER", "~" + os.environ.get("USER", "root"))
        outcome = shut_in(ATTEMPT + code, "assert f() == 'refused'")
    assert outcome == Outcome(True, "passed")
    assert secret.read_text() == "42" and list(secret.parent.iterdir()) != []


@pytest.mark.parametrize("name", SYSCALLS)
def test_system_call_is_refused(name):
    number = SYSCALLS[name][os.uname().machine == "aarch64"]
    if number is None:
        pytest.skip("not on this processor")
    code = f"{OTHER}def f(): return (libc.syscall({number}, 0, 0, 0, 0, 0, 0), ctypes.get_errno())"
    assert shut_in(code, f"assert f() == (-1, {38 if name == 'clone3' else 1})").passed


def test_the_environment_is_clean(monkeypatch):
    monkeypatch.setenv("TINYLORA_TEST_TOKEN", "hunter2")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    code = "import os, sys\ndef f(): return sorted(os.environ), sys.argv[1:], os.getpid(), os.getcwd(), os.listdir('.')"
    expected = (["HOME", "LANG", "PATH", "PYTHONHASHSEED"], ["10.0", str(512 << 20), "1"], 1, "/tmp", [])
    assert shut_in(code, f"assert f() == {expected!r}").passed


def test_no_descriptor_is_open_but_the_answer():
    code = """
import os, stat
def f():
    kinds = []
    for fd in range(3, 64):
        try: kinds.append(stat.S_ISFIFO(os.fstat(fd).st_mode))
        except OSError: pass
    return kinds
"""
    with open(__file__, "rb") as file:
        os.set_inheritable(file.fileno(), True)
        assert shut_in(code, "assert f() == [True]").passed


def test_no_capability_is_left():
    code = f"{OTHER}import struct\ndef f():\n    data = ctypes.create_string_buffer(24)\n"
    code += "    return libc.capget(struct.pack('=Ii', 0x20080522, 0), data), data.raw"
    assert shut_in(code, f"assert f() == (0, {bytes(24)!r})").passed


def test_no_network_interface_is_up():
    """Asked on a pair of connected sockets, the only ones that there can be. Elsewhere at least lo has an address."""
    code = "import fcntl, socket, struct, ctypes\ndef f():\n    room = ctypes.create_string_buffer(4096)\n"
    code += "    ask = struct.pack('iP', 4096, ctypes.addressof(room))\n"
    code += "    return struct.unpack('iP', fcntl.ioctl(socket.socketpair()[0], 0x8912, ask))[0]"
    assert shut_in(code, "assert f() == 0").passed


# --- programs that only must not pass, hang or break anything ---

SOLUTION = "def f(x): return x + 1\n"
SPEAK = """
import os
def speak(words):
    for fd in range(3, 64):
        try: os.write(fd, words)
        except OSError: pass
"""
HARM = {
    "exit": "import sys; sys.exit()",
    "exit 0": "raise SystemExit(0)",
    "hard exit": "import os; os._exit(0)",
    "hard exit as a refusal": "import os; os._exit(125)",
    "hard exit as a time-out": "import os; os._exit(124)",
    "exit in a test": SOLUTION + "def f(x): raise SystemExit",
    "interrupt": "raise KeyboardInterrupt",
    "generator exit": "def f(x): raise GeneratorExit",
    "exception without text": "class E(BaseException):\n    def __str__(self): raise E\nraise E",
    "abort": "import os; os.abort()",
    "segmentation fault": "import ctypes; ctypes.string_at(0)",
    "equal to everything": "class E:\n    def __eq__(self, other): return True\n    def __bool__(self): return True\n"
    "    __hash__ = None\ndef f(x): return E()",
    "int that is equal": "class E(int):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
    "def f(x): return E(7)",
    "list that is equal": "class E(list):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
    "def f(x): return E()",
    "replaced builtins": "import builtins\nfor n in ('exec', 'eval', 'compile', 'isinstance', 'len', 'type'):\n"
    "    setattr(builtins, n, lambda *a, **k: True)",
    "replaced encoder": "import __main__\n__main__.encode = lambda *a: 'true'\n__main__.VALUE = ''",
    "no assertions": "import sys, builtins\nbuiltins.AssertionError = KeyError\nsys.flags\ndef f(x): return None",
    "trace function": "import sys\nsys.settrace(lambda *a: (_ for _ in ()).throw(SystemExit))\ndef f(x): return 3",
    "frames": "import sys\nframe = sys._getframe()\nwhile frame:\n"
    "    frame.f_locals.update(values=['true'] * 9, error='')\n    frame = frame.f_back",
    "collector": "import gc\nfor o in gc.get_objects():\n    if isinstance(o, dict) and 'tests' in o: o['tests'] = []",
    "claims that it passed": SPEAK + "speak(b'{\"values\": [true], \"error\": \"\"}')\nos._exit(0)",
    "claims too deep": SPEAK + "deep = b'[' * 900 + b']' * 900\n"
    "speak(b'{\"error\": ' + deep + b', \"values\": ' + deep + b'}')\nos._exit(0)",
    "writes rubbish for ever": SPEAK + "while True: speak(b'x' * 65536)",
    "closes all": "import os; os.closerange(0, 4096)\ndef f(x): return 3",
    "at exit": "import atexit, os; atexit.register(os.abort)\ndef f(x): return 4",
    "bad destructor": "class D:\n    def __del__(self): raise SystemExit\nd = D(); del d\ndef f(x): return 4",
    "allocates four gigabytes": "x = [bytearray(1 << 20) for _ in range(4096)]\ndef f(x): return 3",
    "one big block": "x = bytearray(1 << 40)",
    "big number": "x = 10 ** 10 ** 10\ndef f(x): return 3",
    "deep recursion": "def f(x): return f(x)",
    "deeper recursion": "import sys; sys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x)",
    "recursion in C": "x = []\nfor _ in range(10 ** 6): x = [x]\nrepr(x)",
    "deep value": "def f(x):\n    x = []\n    for _ in range(10 ** 5): x = [x]\n    return x",
    "value in itself": "def f(x):\n    x = []; x.append(x)\n    return x",
    "long value": "def f(x): return 'a' * (4 << 20)",
    "deep nesting": "(" * 5000,
    "one letter": "f" * 1_000_000,
    "null": "def f(x): return '\0'\0",
    "lone surrogate": "def f(x): return '\ud800'",
    "lone surrogate in the answer": "def f(x): return chr(0xd800)",
    "bad indentation": "def f(x):\nreturn 3",
    "no code": "",
    "text": "I would write a function f that returns 3.",
}  # fmt: skip


@pytest.mark.parametrize("name", HARM)
def test_harm_does_not_pass(name):
    started = time.monotonic()
    outcome = shut_in(HARM[name], "assert f(2) == 3", timeout_seconds=5)
    assert not outcome.passed, outcome
    assert outcome.reason and time.monotonic() - started < 20
    assert not outcome.timed_out or name in ("big number", "deeper recursion")  # as fast as the machine is


ENDLESS = {
    "sleeps": "import time; time.sleep(9999)",
    "spins": "while True: pass",
    "spins in C": "sum(range(10 ** 15))",
    "spins in a test": "def f(x):\n    while True: pass",
    "catches everything": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "ignores signals": "import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\ntime.sleep(9999)",
    "endless destructor": "class D:\n    def __del__(self):\n        while True: pass\nd = D(); del d",
    "endless text of an error": "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
    "endless iterator": "class L(str):\n    @property\n    def __class__(self):\n        while True: pass\n"
    "def f(x): return L()",
    "prints": "while True: print('x' * 65536)",
    "waits on its own pipe": "import os; r, w = os.pipe(); os.read(r, 1)",
    "regular expression": "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_programs_time_out(name):
    started = time.monotonic()
    outcome = shut_in(ENDLESS[name], "assert f(2) == 3", timeout_seconds=0.7)
    assert outcome == Outcome(False, "timed out after 0.7 s", timed_out=True)
    assert time.monotonic() - started < 5


HARMLESS = {
    "stops itself": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)\ndef f(x): return 3",
    "kills the group": "import os; os.kill(0, 9)\ndef f(x): return 3",
    "prints a gigabyte": "for _ in range(1024): print('x' * (1 << 20))\ndef f(x): return 3",
    "closes standard output": "import sys; sys.stdout.close(); sys.stderr.close()\ndef f(x): return 3",
    "imports": "import math, collections, itertools, heapq, re, functools, string, datetime, decimal, random, bisect\n"
    "import typing, json, statistics, fractions, copy, operator, cmath, queue, enum, unicodedata\ndef f(x): return 3",
    "data class": "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    "@dataclass\nclass A:\n    n: int\ndef f(x): return A(x).n + 1",
    "own file": "def f(x):\n    open('a', 'w').write('3')\n    return int(open('a').read())",
    "asyncio": "import asyncio\nasync def g(): return 3\ndef f(x): return asyncio.run(g())",
    "main": "def f(x): return 3\nif __name__ == '__main__': f(input())",
    "own names": "list = dict = str = type = None\ndef f(x): return 3",
    "subclass": "import enum\nclass N(enum.IntEnum):\n    three = 3\ndef f(x): return N.three",
    "leaves a file": "open('a', 'w').write('3')\ndef f(x): return 3",
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_programs_pass(name):
    assert shut_in(HARMLESS[name], "assert f(2) == 3", timeout_seconds=60) == Outcome(True, "passed")


def test_a_program_sees_nothing_of_the_one_before():
    for _ in range(2):
        assert shut_in("import os\nn = len(os.listdir())\nopen('a', 'w')\ndef f(): return n", "assert f() == 0").passed


def test_memory_limit():
    code = "def f(): return len(bytearray(200 << 20))"
    test = f"assert f() == {200 << 20}"
    assert shut_in(code, test).passed
    assert shut_in(code, test, memory_mb=100).reason == "test 1: MemoryError: "


def test_wrong_limits():
    for options in ({"timeout_seconds": 0}, {"memory_mb": 63}, {"timeout_seconds": float("nan")}):
        with pytest.raises(UserError, match="timeout_seconds above 0 and memory_mb of at least 64"):
            run_python("", [], **options)


# --- what the process around it must stand ---


def test_from_threads():
    shut_in("", "")
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda i: run_python(f"def f(): return {i}", ["assert f() == 3"]), range(8)))
    assert [outcome.passed for outcome in outcomes] == [i == 3 for i in range(8)]


def test_beside_busy_threads():
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        assert shut_in(SOLUTION, "assert f(2) == 3").passed
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("isolate", [True, False])
def test_the_code_dies_with_the_program(stop, isolate, tmp_path):
    if isolate:
        shut_in("", "")
    # The background of a script ignores Ctrl-C, and children inherit that.
    program = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tinylora.tasks.sandbox.run import run_python\n"
        f"run_python('import time\\ntime.sleep(9999)', [], timeout_seconds=600, isolate={isolate})"
    )
    (tmp_path / "of it").mkdir()
    environment = {**with_root(), "TMPDIR": str(tmp_path / "of it")}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL, env=environment)
    end = time.monotonic() + 60
    while len(leftovers()) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert len(leftovers()) == 2
    process.send_signal(stop)
    process.wait(timeout=60)
    assert gone()
    if isolate or stop == signal.SIGINT:
        assert list((tmp_path / "of it").iterdir()) == []


def with_root() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# --- where it cannot be done ---

DENIED = """
import ctypes
from tinylora.errors import UserError
from tinylora.tasks.sandbox import child as sandbox_child
from tinylora.tasks.sandbox import run as sandbox
from tinylora.tasks.sets.mbpp import PythonTestsScorer
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
sandbox_child.refuse_system_calls(CALLS)
try:
    PythonTestsScorer()
    print("allowed")
except UserError as error:
    print(error)
print(sandbox.run_python("def f(): return 3", ["assert f() == 3"], isolate=False).passed)
PythonTestsScorer(unsafe_without_namespaces=True)
"""


@pytest.mark.parametrize(
    ("call", "said"), [("unshare", "unshare: Operation not permitted"), ("mount", "mount: Operation not permitted"),
                       ("pivot_root", "syscall: Operation not permitted"), ("mount_setattr", "syscall: ")]
)  # fmt: skip
def test_refused_where_a_container_denies_it(call, said):
    """As Docker's default profile does (unshare), and Ubuntu's rule for unprivileged namespaces (mount)."""
    done = subprocess.run(
        [sys.executable, "-c", DENIED.replace("CALLS", repr((call,)))],
        cwd=ROOT, env=with_root(), capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    message, unsafe = done.stdout.splitlines()
    assert message.startswith("a model's code is run in Linux namespaces of its own") and unsafe == "True"
    assert (said in message or isolation()) and "unsafe_without_namespaces = true" in message


def test_refused_where_the_number_of_namespaces_is_zero():
    shut_in("", "")
    program = "from tinylora.tasks.sandbox.run import check_isolation\ncheck_isolation()"
    shell = f"echo 0 > /proc/sys/user/max_user_namespaces && exec {sys.executable} -c '{program}'"
    done = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", shell], cwd=ROOT, env=with_root(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "this machine does not allow that (unshare: No space left on device)" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_as_an_ordinary_user():
    shut_in("", "")
    request = {"code": "import os\ndef f(): return os.getuid()", "setup": "", "tests": [("value", "f()")]}
    source = Path(sandbox.sandbox_child.__file__).read_text()
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):  # ours may lie in root's home
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            os.chown(folder, 65534, 65534)
            try:
                done = subprocess.run(
                    [python, "-c", source, "10", str(512 << 20), "1"], input=sandbox.marshal.dumps(request, 4),
                    cwd=folder, capture_output=True, user=65534, group=65534, extra_groups=(), check=False, timeout=120,
                )  # fmt: skip
                break
            except OSError:
                continue
    else:
        pytest.skip("no Python here can be read by another user")
    assert done.stdout == b'!{"values": [["int", "fffe"]], "error": ""}', done


@pytest.mark.parametrize(("exit_code", "answer"), [(1, b""), (0, b""), (-9, b""), (0, b"x"), (1, b'!{"values": []}')])
def test_a_failure_of_the_sandbox_is_no_wrong_answer(monkeypatch, exit_code, answer):
    monkeypatch.setattr(sandbox, "_start", lambda *a: (exit_code, answer))
    with pytest.raises(UserError, match=f"failed itself .exit code {exit_code}.; is the machine out of memory"):
        run_python("", [])
    assert run_python("", ["assert f()"], isolate=False).passed is False  # there the code may have killed it


def test_unsafe_leaves_limits_on():
    assert run_python(SOLUTION, ["assert f(2) == 3"], isolate=False).passed
    assert run_python("while True: pass", [], timeout_seconds=0.5, isolate=False).timed_out
    assert "MemoryError" in run_python("bytearray(1 << 40)", [], isolate=False).reason
    assert not run_python("import os; os.kill(os.getppid(), 9)", ["assert f(2) == 3"], isolate=False).passed
    assert not run_python("import os; os.kill(0, 9)", ["assert f(2) == 3"], isolate=False).passed


# --- tests and values ---


@pytest.mark.parametrize(
    ("test", "kind", "source", "expected"),
    [
        ("assert f(1) == [1, (2,)]", VALUE, "f(1)", [1, (2,)]),
        ("assert f(1)==-1.5, 'message'", VALUE, "f(1)", -1.5),
        ("assert {1: 'a'} == f(1)", VALUE, "f(1)", {1: "a"}),
        ("assert f(1) == True", VALUE, "f(1)", True),
        ("assert f(1) == set()", VALUE, "f(1)", set()),
        ("assert f(1) == g(2)", RUN, "assert f(1) == g(2)", True),
        ("assert f(1)", RUN, "assert f(1)", True),
        ("assert 0 < f(1) == 2", RUN, "assert 0 < f(1) == 2", True),
        ("x = 1\nassert f(x) == 1", RUN, "x = 1\nassert f(x) == 1", True),
    ],
)
def test_read_test(test, kind, source, expected):
    check = read_test(test)
    assert (check.kind, check.source, check.expected) == (kind, source, expected)
    assert type(check.expected) is type(expected)


def test_a_test_that_is_no_python():
    for test in ("assert f(", "\0", "(" * 5000):
        with pytest.raises(UserError, match="is no Python"):
            read_test(test)


def test_tests_in_order_with_setup():
    outcome = shut_in("x = []\ndef f(): return x", "assert f() == [1]", "x.append(2)", "assert f() == [1, 2]")
    assert outcome.reason == "test 1: another value than [1]"
    assert run_python("x = []", ["x.append(2)", "assert x == [1, 2]", "assert len(x) == 2"], "x.append(1)").passed
    assert run_python("x = 1", ["assert x == 1", "assert x > 1"]).reason == "test 2: AssertionError: "
    assert run_python("x = 1", ["assert x == 1"], "raise ValueError(3)").reason == "test 1: ValueError: 3"
    assert run_python("1 / 0", []).reason == "ZeroDivisionError: division by zero"


VALUES = [
    None, True, False, 0, 1, -1, 2**70, -(10**5000), 0.0, -0.0, 0.1, float("inf"), 1e308, 1 + 2j, "", "a",
    "\ud800\0\"é", b"\x00a", [], (), set(), {}, [1, [2, (3, {4})]], {"a": {1: (2,)}}, {(1, 2): [3]},
    {1.5, "a", None}, [True], [1],
]  # fmt: skip


def test_values_keep_what_equality_sees():
    import json

    for left in VALUES:
        for right in VALUES:
            assert same(json.loads(encode(left)), right) == (left == right), (left, right)


def test_values_of_other_types():
    import json
    from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

    point = namedtuple("point", "x y")
    for value, expected, equal in (
        (Counter("aab"), {"a": 2, "b": 1}, True),
        (OrderedDict(a=1), {"a": 1}, True),
        (defaultdict(int, a=1), {"a": 1}, True),
        (point(1, 2), (1, 2), True),
        (frozenset({1}), {1}, True),
        (bytearray(b"a"), b"a", True),
        (deque([1]), [1], False),
        (range(2), [0, 1], False),
        (iter([1]), [1], False),
        (float("nan"), float("nan"), False),
        (object(), None, False),
    ):
        assert same(json.loads(encode(value)), expected) is equal, value


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"!", b"!x", b"?", b"![]", b"!{}", b'!{"values": 3}', b'!{"values": []}', b'!{"values": [["?"]]}',
        b'!{"values": [["int"]]}', b'!{"values": [["int", 3]]}', b'!{"values": [["int", "x"]]}', b'!{"values": [3]}',
        b'!{"values": [["str", 3]]}', b'!{"values": ["3"]}', b'!{"values": [["list", "3"]]}', b'!{"values": [null]}',
        b'!{"values": [["dict", [3]]]}', b'!{"values": [["set", [["list", []]]]]}', b'!{"values": [{"int": "3"}]}',
        b'!{"values": [["list", [["int", "3"]]]]}', b"!" + b"[" * 100_000, b"!\xff", b"!" + b"9" * 10_000,
        b'!{"values": [' + b'["list", [' * 300 + b"]]" * 300 + b"]}", b'!{"values": [NaN]}', b'!{"values": [["x", 3]]}',
        b'!{"values": [["int", "3"]], "error": "late"}', b'!{"values": [["float", "nan"]], "error": [[]]}',
    ],
)  # fmt: skip
def test_an_answer_that_nobody_vouches_for(answer):
    outcome = sandbox._judge(answer, [read_test("assert f() == 3")])
    assert not outcome.passed and outcome.reason


def test_judging_costs_no_more_than_the_expected_value():
    """Integers with one hash would make a set of them quadratic; they are not even read."""
    collide = ", ".join(f'["int", "{i * (2**61 - 1):x}"]' for i in range(1, 30_000))
    started = time.monotonic()
    assert not same(sandbox.json.loads(f'["set", [{collide}]]'), {1, 2})
    assert time.monotonic() - started < 2
