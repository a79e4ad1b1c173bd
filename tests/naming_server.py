"""A server on 127.0.0.1 that speaks OpenAI's chat protocol, names units by counting, and fails.

It reads the prompts of `saes.prompts` as a model would, and keeps what it was asked. `faults` says
how the n-th request goes wrong; what is answered with usage is what would be paid for.
"""

import json
import os
import re
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mi_helpers.__main__ import main

QUOTED = r'"(?:[^"\\]|\\.)*"'


def answer(prompt):
    """What a good model would answer: it names a unit by the token that is marked most often."""
    name = re.search(rf"described as ({QUOTED})", prompt)
    if name is None:
        part = prompt.split("These look alike")[0]
        marked = Counter(word.strip() for word in re.findall(r"\[\[(.*?)\]\]", part)[1:])
        return json.dumps({"name": f"the word {marked.most_common(1)[0][0]}"})
    word = json.loads(name[1]).split()[-1]
    lines = re.findall(r"^\d+\. (.*)$", prompt, re.M)
    if "token by token" in prompt:
        found = []
        for number, line in enumerate(lines, start=1):
            tokens = re.findall(rf"(\d+):({QUOTED})", line)
            found += [[number, int(at), 10] for at, t in tokens if json.loads(t).strip() == word]
        return json.dumps(found)
    texts = [json.loads(line) for line in lines]
    if "double brackets" in prompt:
        marks = [set(re.findall(r"\[\[(.*?)\]\]", text)) for text in texts]
        return json.dumps([int(each == {word}) for each in marks])
    return json.dumps([int(word in text.split()) for text in texts])


def command(argv, environment, said):
    """What a process of its own runs: a command of the course, what it says in a file."""
    os.environ |= environment
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        os.environ.pop(name, None), os.environ.pop(name.lower(), None)
    with open(said, "w") as file:
        sys.stdout = sys.stderr = file
        code = main(argv)
    sys.exit(code)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        asked = json.loads(self.rfile.read(length))
        server = self.server
        with server.lock:
            number = len(server.asked)
            prompt = asked["messages"][-1]["content"]
            server.asked.append((time.monotonic(), prompt))
            server.keys.add(self.headers.get("Authorization"))
            server.bodies.append(asked)
        fault = server.faults.get(number) or server.always
        if fault is None:
            self.reply(prompt, answer(prompt))
        else:
            fault(self, prompt)

    def send(self, status, body, kind="application/json", **headers):
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def reply(self, prompt, text, reason="stop"):
        with self.server.lock:
            self.server.paid.append(prompt)
        usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": 9, "total_tokens": 0}
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": reason}
        about = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
        self.send(200, json.dumps(about | {"choices": [choice], "usage": usage}))


# -- how a request goes wrong -----------------------------------------------------------------


def silent(handler, prompt):
    """Nothing comes until the client has given up."""
    handler.server.let_go.wait(5)
    handler.close_connection = True


def busy(seconds):
    def fault(handler, prompt):
        handler.send(429, '{"error": {"message": "slow down"}}', Retry_After=str(seconds))

    return fault


def broken(handler, prompt):
    handler.send(500, "it broke", "text/plain")


def not_json(handler, prompt):
    handler.send(200, '{"choices": [{"mess')


def a_page(handler, prompt):
    handler.send(200, "<html>sign in</html>", "text/html")


def no_choices(handler, prompt):
    handler.send(200, '{"choices": [], "usage": null}')


def no_text(handler, prompt):
    handler.send(200, '{"choices": [{"index": 0, "message": {"role": "assistant"}}]}')


def dropped(handler, prompt):
    handler.connection.close()
    handler.close_connection = True


def half(handler, prompt):
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "500")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"index": 0')
    handler.wfile.flush()
    handler.close_connection = True


def chatty(handler, prompt):
    """An answer that is paid for, and in no form that was asked for."""
    handler.reply(prompt, "I would rather talk about the weather.")


def thinks(tokens):
    """Whoever gives less room than that is paid for nothing but thinking."""

    def fault(handler, prompt):
        room = handler.server.bodies[-1]["max_completion_tokens"] - tokens
        if room > 0:
            handler.reply(prompt, f"<think>so [1, 0]</think>{answer(prompt)}")
        else:
            handler.reply(prompt, None, "length")

    return fault


def tells(status):
    """A refusal that says the key aloud."""

    def fault(handler, prompt):
        key = handler.headers.get("Authorization")
        handler.send(status, json.dumps({"error": {"message": f"wrong: {key}\x1b[31m"}}))

    return fault


def echoes(handler, prompt):
    """A good answer with the key in it."""
    key = handler.headers.get("Authorization").removeprefix("Bearer ")
    handler.reply(prompt, json.dumps({"name": f"{key} the word cat"}))


class Server(ThreadingHTTPServer):
    """It runs in a thread until it is closed.

    Args:
        faults: {number of a request: how it goes wrong}; always: how all others do.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.let_go = threading.Lock(), threading.Event()
        self.faults, self.always = {}, None
        self.asked, self.paid, self.keys, self.bodies = [], [], set(), []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # the client has gone: that is what the test is about

    def close(self):
        self.let_go.set()
        self.shutdown()
        self.server_close()
