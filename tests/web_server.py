"""A web server in a thread, in place of the ones that data sets and teachers are downloaded from."""

import contextlib
import http.server
import threading


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        self.server.answer(self)

    def log_message(self, *args):
        """Stay quiet."""

    def reply(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def wait(self):
        """Send nothing until the server is closed."""
        self.server.silence.wait(20)


@contextlib.contextmanager
def served(answer=None):
    """A server whose GET calls `answer` (also an attribute, to be changed) with its handler."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.answer, server.requests, server.silence = answer, [], threading.Event()
        server.handle_error = lambda *args: None  # clients hang up on purpose
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.silence.set()
            server.shutdown()
            thread.join()
