"""What all tests share: garbage is collected less often, and not in the libraries, which stay."""

import gc

gc.set_threshold(50_000)
import prunekit.run  # noqa: E402, F401 - which imports them

gc.freeze()
