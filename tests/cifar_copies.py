"""Small copies of CIFAR-10 in the formats in which people have it, and a hub that serves one of them."""

import contextlib
import hashlib
import http.server
import io
import threading

import numpy as np
from PIL import Image

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
COUNTS = {"train": 30, "test": 6}
FILES = {split: f"plain_text/{split}-00000-of-00001.parquet" for split in COUNTS}


def arrays(split, seed):
    """Return images and labels that `seed` decides; the labels alone differ between seeds."""
    rng = np.random.default_rng([seed, len(split)])
    count = COUNTS[split]
    return rng.integers(0, 256, (count, 32, 32, 3), np.uint8), (np.arange(count) * 7 + seed).astype(np.int32) % 10


def write_binary(folder, seed=0):
    """Write the files of the binary version to `folder`."""
    folder.mkdir(parents=True)
    for split, names in (("train", [f"data_batch_{i}.bin" for i in range(1, 6)]), ("test", ["test_batch.bin"])):
        images, labels = arrays(split, seed)
        records = np.concatenate([labels[:, None].astype(np.uint8), images.transpose(0, 3, 1, 2).reshape(-1, 3072)], 1)
        for name, part in zip(names, np.split(records, len(names)), strict=True):
            (folder / name).write_bytes(part.tobytes())
    return folder


def write_npz(path, seed=0):
    (x_train, y_train), (x_test, y_test) = (arrays(split, seed) for split in COUNTS)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


def parquet(split, seed=0):
    """Return the content of a Parquet file as the hub has it."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    images, labels = arrays(split, seed)
    pngs = [io.BytesIO() for _ in images]
    for image, png in zip(images, pngs, strict=True):
        Image.fromarray(image).save(png, "PNG")
    table = {"img": [{"bytes": png.getvalue(), "path": None} for png in pngs], "label": labels.astype(np.int64)}
    pq.write_table(pa.table(table), content := io.BytesIO())
    return content.getvalue()


def write_parquet(folder, seed=0):
    folder.mkdir(parents=True)
    for split, file in FILES.items():
        (folder / file.rpartition("/")[2]).write_bytes(parquet(split, seed))
    return folder


class Hub:
    """A local hub. `breaks` closes the connection after so many bytes of the next download; `wrong` changes bytes."""

    def __init__(self, seed):
        self.files = {f"/datasets/uoft-cs/cifar10/resolve/main/{FILES[split]}": parquet(split, seed) for split in FILES}
        self.requests = []  # method, name, Range
        self.breaks, self.status, self.wrong = 0, 200, False


@contextlib.contextmanager
def serving(seed=0):
    hub = Hub(seed)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self, body=False):
            requested = self.headers.get("Range", "")
            hub.requests.append((self.command, self.path.rpartition("/")[2], requested))
            content = hub.files.get(self.path)
            if content is None or hub.status != 200:
                self.send_response(404 if content is None else hub.status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = int(requested.removeprefix("bytes=").rstrip("-") or 0)
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if body:
                sent = content[start:][: hub.breaks or None]
                self.wfile.write(bytes(len(sent)) if hub.wrong else sent)
                hub.breaks, self.close_connection = 0, True

        def do_GET(self):
            self.do_HEAD(body=True)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        yield hub
        server.shutdown()
