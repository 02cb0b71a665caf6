"""The process that runs a program for `molora.evaluate.sandbox`. It is started by the path of this file, with the
standard library alone, confines itself, and then runs what it reads from its input.

Linux's seccomp decides call by call. What a single process needs to compute and to print is allowed; every other call
gives the error "operation not permitted". Nothing in here can be taken back by the program.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

# Numbers of calls on x86-64 and on arm64, which lacks some. Source: asm/unistd_64.h and asm-generic/unistd.h of Linux.
ALLOWED = {
    **{"read": (0, 63), "readv": (19, 65), "write": (1, 64), "writev": (20, 66), "pread64": (17, 67)},
    **{"preadv": (295, 69), "close": (3, 57), "lseek": (8, 62), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24)},
    **{"fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291), "stat": (4, None), "lstat": (6, None)},
    **{"statfs": (137, 43), "fstatfs": (138, 44), "access": (21, None), "faccessat": (269, 48)},
    **{"faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61)},
    **{"getcwd": (79, 17), "pipe": (22, None), "pipe2": (293, 59), "poll": (7, None), "ppoll": (271, 73)},
    **{"select": (23, None), "pselect6": (270, 72), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215)},
    **{"mremap": (25, 216), "brk": (12, 214), "madvise": (28, 233), "membarrier": (324, 283)},
    **{"rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132)},
    **{"restart_syscall": (219, 128), "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293)},
    **{"gettid": (186, 178), "getpid": (39, 172), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175)},
    **{"getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158), "uname": (63, 160), "sysinfo": (99, 179)},
    **{"times": (100, 153), "time": (201, None), "getrusage": (98, 165), "getrlimit": (97, 163)},
    **{"gettimeofday": (96, 169), "clock_gettime": (228, 113), "clock_getres": (229, 114)},
    **{
        "clock_nanosleep": (230, 115),
        "nanosleep": (35, 101),
        "sched_yield": (24, 124),
        "sched_getaffinity": (204, 123),
    },
    **{"getitimer": (36, 102), "setitimer": (38, 103), "alarm": (37, None), "getrandom": (318, 278)},
    **{"exit": (60, 93), "exit_group": (231, 94)},
}
# Calls that are allowed with some arguments: the file is opened to be read (no O_WRONLY, O_RDWR, O_CREAT or O_TRUNC);
# limits are asked for and not set; descriptors are copied and their flags set, but no signal is asked for.
_WRITING = 0o3 | 0o100 | 0o1000
CONDITIONAL = {"open": (2, None), "openat": (257, 56), "prlimit64": (302, 261), "fcntl": (72, 25), "ioctl": (16, 29)}
_OF_FCNTL = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
_OF_IOCTL = (0x5401, 0x5450, 0x5451, 0x541B)  # TCGETS, FIONCLEX, FIOCLEX, FIONREAD

# What the C library answers by an older call, if it is told that there is none.
MISSING = {"clone3": (435, 435)}

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_LOAD, _EQUAL, _ANY_OF, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06


def call_filter(machine: str) -> bytes:
    """The instructions that decide about a call. Raises OSError for a machine whose calls are not known here."""
    if machine not in _MACHINES:
        raise OSError(f"the calls of {machine} are not known; x86_64 and aarch64 are")
    column, architecture = _MACHINES[machine]
    out: list[tuple[int, int, int, int]] = []

    def argument(index: int, upper: bool = False) -> tuple[int, int, int, int]:
        return _LOAD, 0, 0, 16 + 8 * index + 4 * upper

    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERROR | _EPERM)
    out += [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if machine == "x86_64":  # the second set of numbers that this machine has
        out += [(_AT_LEAST, 0, 1, 0x40000000), refuse]
    for numbers, answer in ((ALLOWED, allow), (MISSING, (_RETURN, 0, 0, _ERROR | _ENOSYS))):
        for number in (pair[column] for pair in numbers.values()):
            if number is not None:
                out += [(_EQUAL, 0, 1, number), answer]

    def one_of(index: int, values: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
        return [argument(index), *(each for value in values for each in ((_EQUAL, 0, 1, value), allow)), refuse]

    rules = {
        "open": [argument(1), (_ANY_OF, 1, 0, _WRITING), allow, refuse],
        "openat": [argument(2), (_ANY_OF, 1, 0, _WRITING), allow, refuse],
        "fcntl": one_of(1, _OF_FCNTL),
        "ioctl": one_of(1, _OF_IOCTL),
        # For this process (0), and with no new limits (both halves of the pointer are 0).
        "prlimit64": [
            *(argument(0), (_EQUAL, 0, 5, 0), argument(2), (_EQUAL, 0, 3, 0)),
            *(argument(2, upper=True), (_EQUAL, 0, 1, 0), allow, refuse),
        ],
    }
    for name, rule in rules.items():
        if (number := CONDITIONAL[name][column]) is not None:
            out += [(_EQUAL, 0, len(rule), number), *rule]
    out.append(refuse)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in out)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def confine(limits: dict[str, int]) -> None:
    """Confines this process for good. Raises OSError where the system cannot."""
    code = call_filter(platform.machine())
    for name, value in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        resource.setrlimit(name, (value, value))
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    for option, value, more in (
        (1, signal.SIGKILL, None),  # PR_SET_PDEATHSIG: no program outlives who asked for it
        (38, 1, None),  # PR_SET_NO_NEW_PRIVS
        (22, 2, ctypes.byref(program)),  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    ):
        if libc.prctl(option, ctypes.c_ulong(value), more or ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)):
            raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    """Says on the descriptor `verdict` that it is confined, and with the token that the program came to its end."""
    limits = json.loads(sys.argv[1])
    verdict = limits["verdict"]
    token = sys.stdin.buffer.readline()
    source = sys.stdin.buffer.read()
    try:
        confine(limits)
    except OSError as error:
        os.write(verdict, f"unconfined: {error}".encode())
        return
    os.write(verdict, b"confined\n")
    exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()
    os.write(verdict, token)


if __name__ == "__main__":
    main()
