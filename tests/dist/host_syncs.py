"""host_syncs.py PRESET ARGS: trains, and rank 0 prints as JSON what each step would wait for on a GPU."""

import json
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"
from largescale import train
from largescale.host.launch import leave
from tests.waits import watch

steps = watch(setattr, first=3)
code = train.main(sys.argv[1:])
if os.environ["RANK"] == "0":
    print(json.dumps([[[*place, times] for place, times in step.items()] for step in steps]))
leave(code)
