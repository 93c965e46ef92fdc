# The first code that a host runs, as `python -c`. It reads this package's source and one request
# from standard input, imports the package from memory, and answers the request. It installs
# nothing and writes nothing to disk.
import importlib.abc
import importlib.util
import json
import os
import sys
import zlib


def read_exactly(size):
    """Reads without a buffer, which could swallow input that is meant for the request."""
    data = b""
    while len(data) < size:
        chunk = os.read(0, size - len(data))
        if not chunk:
            sys.exit("the connection closed before the whole request had arrived")
        data += chunk
    return data


header = b""
while header[-1:] != b"\n":
    header += read_exactly(1)
sent = json.loads(zlib.decompress(read_exactly(int(header))))


class SentModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname in sent["modules"]:
            is_package = fullname in ("launch", "launch.host")
            return importlib.util.spec_from_loader(fullname, self, is_package=is_package)

    def get_source(self, fullname):
        return sent["modules"][fullname]

    def exec_module(self, module):
        source = self.get_source(module.__name__)
        exec(compile(source, module.__name__, "exec"), module.__dict__)


if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"python must be 3.11 or newer; got {sys.version}. Set python in the inventory.")
sys.meta_path.insert(0, SentModules())
from launch.host.requests import main  # noqa: E402

# A login shell may have printed something: the answer begins after this line.
os.write(1, f"\n{sent['mark']}\n".encode())
sys.exit(main(sent["request"]))
