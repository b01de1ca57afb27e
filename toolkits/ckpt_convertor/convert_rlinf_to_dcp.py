"""Write an FSDP checkpoint of RLinf as one of rlinf_lite. The code is `rlinf_lite.export.rlinf_to_dcp`."""

import sys

from rlinf_lite.export.rlinf_to_dcp import main

if __name__ == "__main__":
    sys.exit(main())
