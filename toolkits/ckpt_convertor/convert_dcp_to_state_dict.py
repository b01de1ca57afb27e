"""Write the model of a checkpoint as a plain PyTorch state dict. The code is `rlinf_lite.export.dcp_to_state_dict`."""

import sys

from rlinf_lite.export.dcp_to_state_dict import main

if __name__ == "__main__":
    sys.exit(main())
