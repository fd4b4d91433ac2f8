"""Python processes that start quickly: forks of one server, which has imported the large libraries already.

    python tests/warm.py serve SOCKET            import the libraries, then fork for every request
    python -IS tests/warm.py SOCKET -m NAME ...  run a module in a fork; `-c CODE ...` and `SCRIPT ...` work too

The second is a stand-in: it passes on arguments, environment, folder, open files and signals, and ends as the fork
ends. The server imports nothing of this project, and forks share nothing with each other. Linux only.
"""
import atexit
import gc
import json
import os
import selectors
import signal
import socket
import sys
import threading

LIBRARIES = [
    "numpy", "torch", "faiss", "pandas", "scipy.stats", "timm", "torchvision", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "PIL.Image", "pyarrow.parquet", "IPython", "ipykernel.kernelapp", "h5py",
    "safetensors.torch", "nbclient", "nbconvert", "papermill", "seaborn", "transformers", "typer",
]
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(arguments: list[str]) -> None:
    "What the interpreter does with `-m NAME ...`, `-c CODE ...` or `SCRIPT ...`."
    import runpy
    import types

    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), vars(main))
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def become(request: dict, files: list[int]) -> None:
    "Turn a fork of the server into the process that was asked for; does not return."
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit that Ctrl-C is ignored
    for place, file in enumerate(files):
        os.dup2(file, place)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    if "JPY_PARENT_PID" in os.environ:  # a kernel watches its parent, which is the server
        os.environ["JPY_PARENT_PID"] = str(os.getppid())
    os.chdir(request["folder"])
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [os.getcwd(), *(folder for folder in folders if folder)]
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    if "matplotlib" in sys.modules:  # it reads this variable when it is imported
        kernel = any("ipykernel" in word for word in request["arguments"])
        backend = "module://matplotlib_inline.backend_inline" if kernel else "agg"
        sys.modules["matplotlib"].rcParams["backend"] = os.environ.get("MPLBACKEND", backend)
    code = 1
    try:
        code = run(request["arguments"])
    except SystemExit as end:
        code = end.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code or 0)  # taking the libraries apart would take longer than most programs


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    "A request and the open files that come with it."
    received, files, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    while not received.endswith(b"\n"):
        received += connection.recv(1 << 16)
    return json.loads(received), files


def serve(path: str) -> None:
    "Fork for every request until standard input ends; a fork whose stand-in is gone is killed."
    sys.path.pop(0)  # the folder of this file
    for name in LIBRARIES:
        try:
            __import__(name)
        except ImportError:
            pass
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(sys.stdin, selectors.EVENT_READ)
    running = {}  # connection -> process
    ends = {}  # file that tells of a process's end -> connection
    while True:
        for key, _ in waiting.select():
            if key.fileobj is sys.stdin:
                for process in running.values():
                    os.kill(process, signal.SIGKILL)
                os._exit(0)
            if key.fileobj is listener:
                connection, _ = listener.accept()
                request, files = receive(connection)
                process = os.fork()
                if process == 0:
                    for each in (listener, connection, waiting, *running):
                        each.close()
                    for file in ends:
                        os.close(file)
                    become(request, files)
                for file in files:
                    os.close(file)
                connection.sendall(b"%d\n" % process)
                end = os.pidfd_open(process)
                running[connection] = process
                ends[end] = connection
                waiting.register(connection, selectors.EVENT_READ)
                waiting.register(end, selectors.EVENT_READ)
            elif key.fileobj in running:  # it says nothing, so it is gone
                waiting.unregister(key.fileobj)
                os.kill(running[key.fileobj], signal.SIGKILL)
            else:
                connection = ends.pop(key.fileobj)
                _, status = os.waitpid(running.pop(connection), 0)
                waiting.unregister(key.fileobj)
                os.close(key.fileobj)
                if connection in [other.fileobj for other in waiting.get_map().values()]:
                    waiting.unregister(connection)
                    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
                connection.close()


def stand_in(path: str, arguments: list[str]) -> None:
    "Have a fork run a program, pass signals on to it, and end as it ends."
    fork = None
    early = []  # signals before there is a fork

    def forward(number: int, _) -> None:
        os.kill(fork, number) if fork else early.append(number)

    for number in FORWARDED:
        signal.signal(number, forward)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    content = json.dumps(request).encode() + b"\n"
    socket.send_fds(connection, [content[:1024]], [0, 1, 2])
    connection.sendall(content[1024:])
    answers = connection.makefile()
    fork = int(answers.readline())
    for number in early:
        os.kill(fork, number)
    code = int(answers.readline() or 1)
    if code < 0:
        if -code in FORWARDED:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        stand_in(sys.argv[1], sys.argv[2:])
