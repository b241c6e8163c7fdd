"""What the process that local workers are forked from imports first: from then on it is killed when its parent ends.

By itself it would notice only after all its other imports, seconds later, as it does where there is no Linux
(prctl(2), PR_SET_PDEATHSIG). Forked workers do not inherit it, they watch their parent themselves.
"""

import os
import signal
import sys

from flexbert_core.children import ends_with_parent

if sys.platform.startswith("linux"):
    ends_with_parent(signal.SIGKILL)()
# Where this process is started a second time, since it was killed, nobody says whose it is.
if "FLEXBERT_PREPARE_PID" in os.environ and os.getppid() != int(os.environ["FLEXBERT_PREPARE_PID"]):
    os._exit(1)  # the parent ended before that
