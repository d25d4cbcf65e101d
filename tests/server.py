"""Starts the command sooner: it has imported the libraries that the script imports, and forks a
process for each command line that it is sent.

It waits for that process, and tells its exit status; or lets go of it, so that whoever has sent the
command line inherits it, as a process of its own.

That process runs the script from its first line to its last, as Python would: as __main__, without
any name of this file, with arguments, environment, directory and standard streams of its own; and
it ends as Python ends.
"""

import ast
import json
import os
import socket
import sys
from types import CodeType


def serve(script: str, descriptor: int, modules: list[str]) -> CodeType:
    """Answer each request over a socket with a process's number and exit status, or 0 when it has
    been let go of. Returns in that process, with the script that it shall run."""
    with open(script, "rb") as file:
        text = file.read()
    sys.path[0] = os.path.dirname(script)
    imports: list[ast.stmt] = [
        node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    exec(compile(ast.Module(imports, []), script, "exec", dont_inherit=True), {})
    for name in modules:
        __import__(name)
    code: CodeType = compile(text, script, "exec", dont_inherit=True)
    with socket.socket(fileno=descriptor) as channel:
        while True:
            request, streams, *_ = socket.recv_fds(channel, 1 << 22, 3)
            if not request:
                os._exit(0)
            arguments, directory, environment, *options = json.loads(request)
            is_let_go, has_session, umask = options
            pid = os.fork()
            if is_let_go and not pid and (pid := os.fork()):
                channel.send(b"%d" % pid)
                os._exit(0)  # this process, between both
            if not pid:
                break
            for stream in streams:
                os.close(stream)
            if not is_let_go:
                channel.send(b"%d" % pid)
            channel.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    if has_session:
        os.setsid()
    if umask >= 0:
        os.umask(umask)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    names = globals()
    for name in [name for name in names if not name.startswith("__")]:
        del names[name]
    names["__file__"] = script
    return code


if __name__ == "__main__":
    exec(serve(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
