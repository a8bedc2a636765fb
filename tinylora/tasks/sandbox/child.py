"""What `sandbox.py` starts: a program that shuts itself in and then runs code nobody has read. Standard library only,
and little of it: it is started for every reply, and each of json, typing, contextlib and platform takes milliseconds.

    python sandbox_child.py SECONDS MEMORY_BYTES ISOLATE < request > answer

The request, in Python's marshal format: `code`, `setup` and `tests`, a list of (kind, source). The answer is one byte
and a text: "!" and JSON of what the tests gave (see `_run`), or "?" and why the machine does not allow this.

Two processes. This one waits, reads at most ANSWER_BYTES, and kills. Its child is the first process of namespaces of
its own; it sees the standard library and shared libraries read-only, an empty /tmp in memory, no other file, no device,
no other process, no network, and it can start neither a process nor a thread. Nothing in it is secret: the expected
values are not there, so whatever the code does to this program, all it can do is answer.

Exit codes: 0 it has answered or ended, TIMED_OUT, REFUSED.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import select
import struct
import sys
import time
from _json import encode_basestring_ascii as quoted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, NoReturn

TIMED_OUT, REFUSED = 124, 125
VALUE, RUN = "value", "run"
ANSWER_BYTES, FOLDER_BYTES, FILE_BYTES, NUM_FILES = 1 << 20, 16 << 20, 1 << 20, 64
DEEPEST = 100

NEW_NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000
"""User, mounts, processes, network, interprocess communication, host name."""
MS_NOSUID, MS_NODEV, MS_BIND_ALL, MS_PRIVATE_ALL = 2, 4, 0x1000 | 0x4000, 0x40000 | 0x4000
READ_ONLY, READ_ONLY_NOSUID_NODEV = 1, 1 | 2 | 4
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MNT_DETACH = 442, -100, 0x8000, 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
EPERM, ENOSYS, SIGKILL = 1, 38, 9

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# System calls that are refused, by number on x86_64 and aarch64 (None: not there).
SYSCALLS: dict[str, tuple[int | None, int | None]] = {
    # processes and threads; other programs
    "clone": (56, 220), "clone3": (435, 435), "fork": (57, None), "vfork": (58, None), "execve": (59, 221),
    "execveat": (322, 281), "setsid": (112, 157), "setpgid": (109, 154),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "kcmp": (312, 272),
    # the network; socketpair, which asyncio needs, reaches nobody
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    # parts of the kernel with many bugs behind them, and keys
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "modify_ldt": (154, None),
    # memory that no limit counts
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    # undoing the above: the signal at the parent's death
    "prctl": (157, 167), "seccomp": (317, 277),
}  # fmt: skip
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/nix/store")


def main(seconds: float, memory_bytes: int, isolate: bool) -> int:
    """Start the child, read its answer, kill it: in time, and when it has closed its end. Returns the exit code."""
    request = marshal.loads(sys.stdin.buffer.read())
    out = os.dup(1)
    _silence(os.devnull)
    read_end, write_end = os.pipe()
    try:
        _die_with_parent()
        if isolate:
            _unshare()
    except OSError as error:
        os.write(out, _why_not(error))
        return REFUSED
    child = os.fork()
    if child == 0:
        os.close(read_end)
        os.close(out)
        try:
            _die_with_parent()
            if isolate:
                os.setsid()  # kill(0, ...) reaches the whole group, across namespaces
                _shut_in()
            _limit(seconds, memory_bytes, must=isolate)
            if isolate:
                _give_up_rights()
        except (OSError, ValueError) as error:
            os.write(write_end, _why_not(error))
            os._exit(REFUSED)
        os.write(write_end, b"!")
        _run(request, write_end)
    os.close(write_end)
    try:
        answer, in_time = _read(read_end, time.monotonic() + seconds)
    finally:
        os.kill(child, SIGKILL)
        os.waitpid(child, 0)
    for start in range(0, len(answer), 1 << 16):
        os.write(out, answer[start : start + (1 << 16)])
    return TIMED_OUT if not in_time else REFUSED if answer[:1] == b"?" else 0


def _silence(null: str) -> None:
    nothing = os.open(null, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.close(nothing)


def _read(pipe: int, deadline: float) -> tuple[bytes, bool]:
    """What comes out of the pipe until it is closed, and whether that was before the deadline."""
    answer = b""
    while len(answer) <= ANSWER_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            return answer, False
        part = os.read(pipe, 1 << 16)
        if not part:
            break
        answer += part
    return answer, True


def _run(request: dict[str, Any], answer: int) -> NoReturn:
    """Run code, setup and tests, and write {"values": [...], "error": "..."}: a value for each test that was reached.

    VALUE: `source` is an expression, and its value is given in the form of `encode`. RUN: `source` is run and gives
    true if nothing is raised.
    """
    module = type(sys)("candidate")
    sys.modules["candidate"] = module  # dataclasses look their module up
    names = module.__dict__
    values: list[str] = []
    error = ""
    write, leave, run, value_of = os.write, os._exit, exec, eval
    try:
        run(compile(request["code"], "<reply>", "exec"), names)
        run(compile(request["setup"], "<setup>", "exec"), names)
        for kind, source in request["tests"]:
            if kind == VALUE:
                values.append(encode(value_of(compile(source, "<test>", "eval"), names)))
            else:
                run(compile(source, "<test>", "exec"), names)
                values.append("true")
    except BaseException as failure:  # SystemExit and KeyboardInterrupt are ways to fail, too
        error = type(failure).__name__
        try:  # an exception's text is code, too
            error = f"{error}: {failure}"[:300]
        except BaseException:
            error += ", whose text cannot be read"
    try:
        left = f'{{"values": [{", ".join(values)}], "error": {quoted(error)}}}'.encode()
        while left:
            left = left[write(answer, left[: 1 << 16]) :]
    finally:
        leave(0)


def encode(value: object, depth: int = 0) -> str:
    """A value of plain Python as JSON: None and booleans as they are, all else as [type, content].

    Subclasses of plain types count as these, as they do for ==; anything else is ["?"], equal to nothing.
    """
    if value is None:
        return "null"
    if value is True or value is False:
        return "true" if value else "false"
    if isinstance(value, int):
        digits = int.__format__(value, "x")  # decimal digits of a long one would take quadratic time
        return f'["int", "{digits}"]'
    for kind in (float, complex):
        if isinstance(value, kind):
            return f'["{kind.__name__}", "{kind.__repr__(value)}"]'
    if isinstance(value, str):
        return f'["str", {quoted(value)}]'
    if isinstance(value, (bytes, bytearray)):
        return f'["bytes", "{bytes(value).hex()}"]'
    if depth < DEEPEST:
        for sequence in (list, tuple, set, frozenset):
            if isinstance(value, sequence):
                parts = [encode(part, depth + 1) for part in sequence.__iter__(value)]  # type: ignore[arg-type]
                return f'["{sequence.__name__}", [{", ".join(parts)}]]'
        if isinstance(value, dict):
            pairs = [f"[{encode(key, depth + 1)}, {encode(part, depth + 1)}]" for key, part in dict.items(value)]
            return f'["dict", [{", ".join(pairs)}]]'
    return '["?"]'


# --- shutting in ---


def _call(name: str, *arguments: object) -> None:
    """A function of the C library that returns -1 where it fails. Raises: OSError that names it."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _why_not(error: Exception) -> bytes:
    return b"?" + (str(error).partition("] ")[2] or str(error)).encode()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        _call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)


def _unshare() -> None:
    """Namespaces of its own; the user stays who it is, as the only one in there."""
    if sys.platform != "linux" or os.uname().machine not in ARCHITECTURES:
        raise OSError(EPERM, f"no namespaces are known on {sys.platform} {os.uname().machine}")
    user, group = os.geteuid(), os.getegid()
    _call("unshare", NEW_NAMESPACES)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{user} {user} 1")
    _write("/proc/self/gid_map", f"{group} {group} 1")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _shut_in() -> None:
    """A root folder in memory with the libraries, read-only; /tmp to write into; the old root is gone."""
    root = "/proc"  # a folder that is always there and not needed any more: nothing has to be made, or left behind
    _call("mount", b"none", b"/", None, MS_PRIVATE_ALL, None)
    _call("mount", b"tmpfs", root.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=0755")
    os.mkdir(f"{root}/tmp")  # first, as a Python that lives in there is put into it
    size = f"size={FOLDER_BYTES},nr_inodes=1024,mode=0777".encode()
    _call("mount", b"tmpfs", f"{root}/tmp".encode(), b"tmpfs", MS_NOSUID | MS_NODEV, size)
    folders = {os.path.normpath(path) for path in (*LIBRARIES, os.path.join(sys.base_prefix, "lib"), *sys.path)}
    bound: list[str] = []
    for folder in sorted(folder for folder in folders if os.path.isabs(folder) and os.path.isdir(folder)):
        if folder == "/tmp":
            continue
        if not any(folder.startswith(f"{outer}/") for outer in bound):
            os.makedirs(root + folder, exist_ok=True)
            _call("mount", folder.encode(), (root + folder).encode(), None, MS_BIND_ALL, None)
            bound.append(folder)
    # Standard input and output by a mount that becomes read-only: through the one from before, root could change the
    # rights of everybody's /dev/null.
    os.close(os.open(f"{root}/null", os.O_CREAT | os.O_WRONLY))
    _call("mount", b"/dev/null", f"{root}/null".encode(), None, MS_BIND_ALL, None)
    _silence(f"{root}/null")
    attributes = struct.pack("=QQQQ", READ_ONLY_NOSUID_NODEV, 0, 0, 0)
    _call("syscall", MOUNT_SETATTR, AT_FDCWD, root.encode(), AT_RECURSIVE, attributes, len(attributes))
    writable = struct.pack("=QQQQ", 0, READ_ONLY, 0, 0)  # of /tmp alone, not of what lies in it
    _call("syscall", MOUNT_SETATTR, AT_FDCWD, f"{root}/tmp".encode(), 0, writable, len(writable))
    os.chdir(root)
    _call("syscall", SYSCALLS["pivot_root"][os.uname().machine == "aarch64"], b".", b".")
    _call("umount2", b".", MNT_DETACH)
    os.chdir("/tmp")


def _limit(seconds: float, memory_bytes: int, must: bool) -> None:
    """What the kernel counts. `must`: a limit that cannot be set is an error."""
    import resource  # not on Windows, where sandbox.py still reads this file's names

    limits = {
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_CPU": int(seconds) + 2,
        "RLIMIT_FSIZE": FILE_BYTES,
        "RLIMIT_NOFILE": NUM_FILES,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 0,  # for root it does not count: there the filter of system calls does it
    }
    for name, limit in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (limit, limit))
        except (AttributeError, OSError, ValueError):  # ValueError: above a hard limit, which then is stricter
            if must and resource.getrlimit(getattr(resource, name))[1] > limit:
                raise


def _give_up_rights() -> None:
    """No capability, no way to get one, and a filter of system calls."""
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))
    refuse_system_calls(SYSCALLS)


def refuse_system_calls(names: Iterable[str]) -> None:
    """From here on these system calls fail with EPERM, for this process and all that it starts (seccomp).

    Raises: OSError where the kernel does not allow it. Needs no_new_privs or the right to set the filter.
    """
    machine = os.uname().machine
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse, absent = 0x7FFF0000, 0x00050000 | EPERM, 0x00050000 | ENOSYS
    program = [(load, 0, 0, 4), (equal, 1, 0, ARCHITECTURES[machine]), (give, 0, 0, refuse), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (give, 0, 0, refuse)]  # x86's second set of the same calls
    for name in names:
        number = SYSCALLS[name][machine == "aarch64"]
        if number is not None:  # clone3 is said not to exist, so that the C library takes clone, and is refused that
            program += [(equal, 0, 1, number), (give, 0, 0, absent if name == "clone3" else refuse)]
    program += [(give, 0, 0, allow)]
    lines = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    _call("prctl", PR_SET_SECCOMP, 2, struct.pack("@HP", len(program), ctypes.addressof(lines)), 0, 0)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1"))
