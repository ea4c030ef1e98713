"""Asks a served model once, as a user would.

Enters: its address. Leaves: one JSON line. Refuses: an answer without words.
"""

import json
import sys
import time
import urllib.request

address = sys.argv[1]
body = {"model": "smoke", "messages": [{"role": "user", "content": "Say one word."}], "max_tokens": 8, "temperature": 0}
request = urllib.request.Request(
    f"{address}/v1/chat/completions", data=json.dumps(body).encode(), headers={"content-type": "application/json"}
)
start = time.perf_counter()
with urllib.request.urlopen(request, timeout=120) as reply:
    answer = json.load(reply)
text = answer["choices"][0]["message"]["content"]
print(json.dumps({"answer": text, "seconds": round(time.perf_counter() - start, 3), "usage": answer.get("usage")}))
if not text.strip():
    sys.exit("The model answered nothing.")
