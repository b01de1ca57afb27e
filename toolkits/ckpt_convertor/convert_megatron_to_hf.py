"""Write the model of a checkpoint in Megatron's layout as a Hugging Face directory.

The code is `rlinf_lite.export.megatron_to_hf`.
"""

import sys

from rlinf_lite.export.megatron_to_hf import main

if __name__ == "__main__":
    sys.exit(main())
