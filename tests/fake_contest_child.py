"""Stands in for pallas_kernels.contest_child: fails in the way that the contest's name asks for."""

import json
import os
import sys
import time
from pathlib import Path

job, path = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
sys.stdin.readline()
timed = {"median_s": 1e-3, "low_s": 1e-3, "high_s": 1e-3, "distances": [1e-3], "fault": ""}
if not job["name"]:
    device = {"device": "fake", "jax": "0.0.0", "chip": "h100", "arch": "sm_90"}
    ceilings = {"matmul_flops_per_s": 1e12, "copy_bytes_per_s": 1e12}
    path.write_text(json.dumps(device | ceilings))
    sys.exit()
if "silent" in job["name"]:
    sys.exit()
if "half" in job["name"] or "list" in job["name"]:
    path.write_text('{"contestants": {' if "half" in job["name"] else "[]")
    sys.exit()
contestants = {"xla": timed | {"median_s": 2e-3}}
result = {"contestants": contestants}
if job["tune_s"]:
    untried = ["forward c"] * ("abort" in job["name"])
    result |= {"tried": job["tried"] | {"forward b": 1e-3}, "untried": untried}
path.write_text(json.dumps(result))
if "chatty" in job["name"]:
    print("x" * 10_000_000, "\nthe last line", flush=True)
    sys.exit(7)
if "documents" in job["name"] or ("square" in job["name"] and job["tune_s"]):
    time.sleep(60)
if "head" in job["name"] or ("abort" in job["name"] and job["tune_s"]):
    os.abort()
if "square" in job["name"]:
    contestants["triton"] = "wrong: result 0 is 0.5 from float64, at most 0.003 is allowed"
else:
    contestants["triton"] = timed | {"tiles": None}
path.write_text(json.dumps(result | {"done": True}))
