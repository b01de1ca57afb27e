"""Write the weights of a Hugging Face directory as a checkpoint. The code is `rlinf_lite.export.hf_to_dcp`."""

import sys

from rlinf_lite.export.hf_to_dcp import main

if __name__ == "__main__":
    sys.exit(main())
