"""Python imports this module at its start where the folder is on PYTHONPATH.
DMR_TEST_KILL says which processes die when: JSON with the arguments of
`die_at_write` and `role`, a word of their command line.
"""

import json
import os
import sys

from dies import die_at_write

if asked := os.environ.get("DMR_TEST_KILL"):
    how = json.loads(asked)
    if how.pop("role") in " ".join(sys.orig_argv):
        die_at_write(**how)
