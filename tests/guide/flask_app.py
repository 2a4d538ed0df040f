"""The webhook guide's Flask handler, its logic as it is printed there. It tells which event it took."""

import hashlib
import hmac
import json
import os

from flask import Flask, request
from werkzeug.serving import make_server

app = Flask(__name__)

WEBHOOK_SECRET = os.environ["WEBHOOK_SECRET"]


def verify_signature(payload, signature, secret):
    expected = hmac.new(secret.encode(), json.dumps(payload).encode(), hashlib.sha256).hexdigest()

    return hmac.compare_digest(signature, expected)


@app.route("/webhooks/trackpost", methods=["POST"])
def handle_webhook():
    # Verify signature
    signature = request.headers.get("X-Trackpost-Signature")
    if not verify_signature(request.json, signature, WEBHOOK_SECRET):
        return "Invalid signature", 401

    event = request.json
    os.write(1, f"{event['id']}\n".encode())  # whole lines, whatever other threads write

    return "OK", 200


server = make_server("127.0.0.1", 0, app, threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
