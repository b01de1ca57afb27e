"""Write the model of a checkpoint in Megatron's layout as a plain PyTorch state dict.

The code is `rlinf_lite.export.megatron_to_state_dict`.
"""

import sys

from rlinf_lite.export.megatron_to_state_dict import main

if __name__ == "__main__":
    sys.exit(main())
