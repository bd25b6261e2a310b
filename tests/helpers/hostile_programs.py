"""Programs that try to outlive, outgrow or deceive the evaluator.

`MARK` is an argument of every command they start, by which a test finds what is left over.
"""

import os

MARK = f"31415926.{os.getpid()}"  # of this process: tests run side by side

# Attempts at a limit; none passes.
GREEDY = {
    "flood_of_output": """
        import os
        block = b"x" * 2**20
        while True:
            for descriptor in range(64):
                try:
                    os.write(descriptor, block)
                except OSError:
                    pass
    """,
    "fork_bomb": """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """,
    "chain_of_forks": """
        import os
        while True:
            if os.fork():
                os._exit(0)
    """,
    "sleep_for_ever": "import time\nwhile True: time.sleep(1000)",
    "sleep_after_closing_everything": """
        import os, time
        os.closerange(0, 64)
        time.sleep(1000)
    """,
    "ignored_signals": """
        import signal
        for number in range(1, 65):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        while True: pass
    """,
    "catastrophic_regex": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "long_power": "10 ** 10**8",
    "memory": "held = []\nwhile True: held.append(bytearray(2**20))",
    "memory_of_many": """
        import os, time
        for _ in range(8):
            if os.fork() == 0:
                break
        held = bytearray(b"x") * (600 * 2**20)
        time.sleep(1000)
    """,
    "shared_memory": """
        import mmap, os, time
        for _ in range(8):
            os.fork()
            held = mmap.mmap(-1, 400 * 2**20)
            held.write(bytes(400 * 2**20))
        time.sleep(1000)
    """,
    "threads": """
        import threading, time
        for _ in range(1000):
            threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    """,
    "many_files": """
        import itertools
        for i in itertools.count():
            open(str(i), "wb").write(bytes(2**24))
    """,
    "removed_files": """
        import os
        held = []
        while True:
            held.append(open("file", "wb", 0))
            held[-1].write(bytes(2**24))
            os.remove("file")
    """,
    "files_of_memory": """
        import os
        while True:
            os.write(os.memfd_create("file"), bytes(2**24))
    """,
    "many_empty_files": """
        import itertools
        for i in itertools.count():
            open(str(i), "wb").close()
    """,
    "deep_folders": """
        import os
        while True:
            os.mkdir("folder")
            os.chdir("folder")
    """,
    "huge_file": """
        file = open("file", "wb")
        while True: file.write(bytes(2**20))
    """,
    "files_of_shared_memory": """
        import itertools
        for i in itertools.count():
            open(f"/dev/shm/program-{i}", "wb").write(bytes(2**24))
    """,
    "deep_recursion": "def f(): return f()\nf()",
    "deep_recursion_in_c": """
        import sys
        sys.setrecursionlimit(10**9)
        class C:
            def __getattr__(self, name): return getattr(self, name + "x")
        C().x
    """,
    "segmentation_fault": "import ctypes\nctypes.string_at(0)",
    "exception_without_text": """
        class Endless(Exception):
            def __str__(self):
                while True: pass
        raise Endless
    """,
}

# Ends before the last line, and false reports of a pass; none passes.
FORGED = {
    "exit_of_the_process": "import os\nos._exit(0)",
    "exit": "import sys\nsys.exit(0)",
    "system_exit": "raise SystemExit",
    "quit": "quit()",
    "keyboard_interrupt": "raise KeyboardInterrupt",
    "end_by_exec": "import os\nos.execv('/bin/true', ['true'])",
    "exit_at_exit": "import atexit, os, sys\natexit.register(os._exit, 0)\nsys.exit()",
    "statuses_of_the_supervisor": "import os\nos._exit(10)",
    "exit_of_the_parent_of_a_fork": """
        import os
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                raise ValueError
        os._exit(0)
    """,
    "words_of_arguments": """
        import os, sys
        words = sys.argv + sys.orig_argv
        words += open("/proc/self/cmdline").read().split("\\0")
        words += open("/proc/self/environ").read().split("\\0")
        for word in words:
            for descriptor in range(64):
                try:
                    os.write(descriptor, word.encode())
                except OSError:
                    pass
        os._exit(0)
    """,
    "words_of_frames": """
        import os, sys
        frame, words = sys._getframe(), []
        while frame:
            for space in (frame.f_locals, frame.f_globals):
                words += map(str, space.values())
            words += map(str, frame.f_code.co_consts)
            frame = frame.f_back
        for word in words:
            for descriptor in range(64):
                try:
                    os.write(descriptor, word.encode())
                except OSError:
                    pass
        os._exit(0)
    """,
    "words_of_the_collector": """
        import gc, os
        words = set()
        for held in gc.get_objects():
            words |= {x for x in gc.get_referents(held) if type(x) in (str, bytes)}
        for word in sorted(words, key=len):
            word = word.encode(errors="replace") if isinstance(word, str) else word
            if 16 <= len(word) <= 64:
                for descriptor in range(64):
                    try:
                        os.write(descriptor, word)
                    except OSError:
                        pass
        os._exit(0)
    """,
    "words_of_memory": """
        import os, re
        words = set()
        with open("/proc/self/mem", "rb", 0) as memory:
            for line in open("/proc/self/maps"):
                if "rw-p" in line and "[v" not in line:
                    first, last = (int(x, 16) for x in line.split()[0].split("-"))
                    memory.seek(first)
                    words |= set(re.findall(b"[0-9a-f]{32,64}", memory.read(last - first)))
        for word in [*words, b"x"]:
            for descriptor in range(64):
                try:
                    os.write(descriptor, word)
                except OSError:
                    pass
        os._exit(0)
    """,
    "echo_of_every_descriptor": """
        import os
        for word in (b"passed", b"ok", b"0", b""):
            for descriptor in range(3, 64):
                try:
                    os.set_blocking(descriptor, False)
                    os.write(descriptor, word)
                    os.write(descriptor, os.read(descriptor, 100))
                except OSError:
                    pass
        os._exit(0)
    """,
    "answer_of_the_protocol": """
        import os
        for descriptor in range(3, 64):
            try:
                os.write(descriptor, b"done")
                os.write(descriptor, os.read(descriptor, 64))
            except OSError:
                pass
        os._exit(0)
    """,
    "answer_of_another_thread": """
        import os, threading, time
        def answer():
            for descriptor in range(3, 64):
                try:
                    os.write(descriptor, b"done")
                    os.write(descriptor, os.read(descriptor, 64))
                except OSError:
                    pass
            os._exit(0)
        threading.Thread(target=answer).start()
        time.sleep(1000)
    """,
    "answer_of_another_thread_after_a_failure": """
        import os, threading, time
        def answer():
            for descriptor in range(3, 64):
                try:
                    os.write(descriptor, b"done")
                    os.write(descriptor, os.read(descriptor, 64))
                except OSError:
                    pass
        threading.Thread(target=answer).start()
        time.sleep(0.1)
        raise ValueError
    """,
    "answer_of_a_child": """
        import os
        if os.fork():
            os.wait()
        for descriptor in range(3, 64):
            try:
                os.write(descriptor, b"done")
                os.write(descriptor, os.read(descriptor, 64))
            except OSError:
                pass
        os._exit(0)
    """,
    "answer_of_an_exception": """
        import os
        class Answer(Exception):
            def __str__(self):
                for descriptor in range(3, 64):
                    try:
                        os.write(descriptor, b"done")
                        os.write(descriptor, os.read(descriptor, 64))
                    except OSError:
                        pass
                os._exit(0)
        raise Answer
    """,
    "answer_of_a_builtin": """
        import builtins, os, sys
        def answer(*arguments):
            for descriptor in range(3, 64):
                try:
                    os.write(descriptor, b"done")
                    os.write(descriptor, os.read(descriptor, 64))
                except OSError:
                    pass
            os._exit(0)
        frame = sys._getframe(1)
        for name in ("type", "kind", "getpid", "read", "write", "leave", "str", "compile"):
            frame.f_globals[name] = answer
        builtins.type = answer
        raise ValueError
    """,
    "jump_to_the_end": """
        import sys
        frame = sys._getframe(1)
        lines = sorted({line for *_, line in frame.f_code.co_lines() if line})
        def trace(frame, event, argument):
            for line in reversed(lines):
                try:
                    frame.f_lineno = line
                except ValueError:
                    pass
            return trace
        frame.f_trace = trace
        sys.settrace(trace)
        raise ValueError
    """,
    "replaced_builtins": """
        import builtins, os, sys
        def nothing(*args, **kwargs): return 0
        for module in (builtins, os, sys):
            for name in ("exec", "compile", "BaseException", "type", "exit", "_exit", "write"):
                setattr(module, name, nothing)
        raise ValueError
    """,
    "thread_that_exits": """
        import os, threading
        def leave():
            for descriptor in range(3, 64):
                try:
                    os.write(descriptor, b"passed")
                except OSError:
                    pass
            os._exit(0)
        thread = threading.Thread(target=leave)
        thread.start()
        thread.join()
    """,
    "alarm_that_exits": """
        import os, signal
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        while True: pass
    """,
    "trace_of_the_parent": """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.ptrace(16, os.getppid(), 0, 0) == 0  # PTRACE_ATTACH
    """,
    "memory_of_the_parent": "import os\nopen(f'/proc/{os.getppid()}/mem', 'r+b', 0)",
    "pipe_of_the_parent": """
        import os
        assert any(
            os.write(os.open(f"/proc/{status.split()[0]}/fd/1", os.O_WRONLY), b"passed")
            for status in [open("/proc/self/stat").read().split(")")[-1].split()[1]]
        )
    """,
    "prlimit_of_the_parent": """
        import os, resource
        parent = int(open("/proc/self/stat").read().split(")")[-1].split()[1])
        if os.fork() == 0:
            os.setsid()
            while True: pass
        resource.prlimit(parent, resource.RLIMIT_CPU, (0, 0))
        raise ValueError
    """,
    "links_out_of_the_folder": """
        import os, pathlib
        os.symlink("/dev/shm", "outside")
        os.symlink(pathlib.Path.home().parent, "above")
        os.symlink("/", "root")
        os.chmod(".", 0o500)
        raise ValueError
    """,
    "capabilities_by_exec": """
        import subprocess, sys
        code = "import ctypes; print(ctypes.CDLL(None).unshare(0x00020000))"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        assert out.strip() == "0"
    """,
    "segment_that_outlives": """
        import ctypes
        assert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0
    """,
}

# Attempts to reach other processes; none passes, and the others live.
MURDEROUS = {
    "killed_parent": "import os\nos.kill(os.getppid(), 9)\nos._exit(0)",
    "killed_group": "import os\nos.killpg(0, 9)",
    "killed_everything": """
        import os
        os.setsid() if os.fork() == 0 else None
        os.kill(-1, 9)
        os._exit(0)
    """,
    "killed_first_process": "import os\nos.kill(1, 9)\nos._exit(0)",
    "stopped_parent": "import os, time\nos.kill(os.getppid(), 19)\ntime.sleep(1000)",
}

# Run to their last line; they pass, but nothing they have begun goes on.
LINGERING = {
    "daemon_of_two_forks": f"""
        import os
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.closerange(0, 64)
                os.execv("/bin/sleep", ["sleep", "{MARK}"])
            os._exit(0)
    """,
    "new_session": f"""
        import subprocess
        subprocess.Popen(["sleep", "{MARK}"], start_new_session=True)
    """,
    "deaf_child": f"""
        import subprocess, sys
        subprocess.Popen(["sh", "-c", "trap '' TERM HUP INT; while :; do sleep {MARK}; done"])
    """,
    "threads_that_go_on": """
        import threading, time
        for _ in range(8):
            threading.Thread(target=time.sleep, args=(1000,)).start()
    """,
    "threads_that_compute": """
        import threading
        def compute():
            while True: pass
        for _ in range(4):
            threading.Thread(target=compute).start()
    """,
    "deep_call_before": """
        def f(n): return sorted([n], key=lambda n: n and f(n - 1) or 0)
        f(100)
    """,
    "removed_folder": """
        import os, shutil
        folder = os.getcwd()
        os.chdir("/")
        try:
            shutil.rmtree(folder)
        except OSError:
            pass
    """,
    "folder_without_permissions": """
        import os
        os.makedirs("a/b")
        open("a/b/c", "w").close()
        os.chmod("a/b", 0)
        os.chmod("a/b", 0o500)
        os.chmod("a", 0o500)
    """,
    "hooks_at_the_end": """
        import atexit, os, sys
        atexit.register(os.abort)
        sys.excepthook = sys.unraisablehook = lambda *_: os.abort()
    """,
    "ended_child": """
        import subprocess
        child = subprocess.Popen(["sleep", "1000"])
        child.kill()
        assert child.wait() == -9
    """,
    "input": "import sys\nassert sys.stdin.read() == ''",
}
