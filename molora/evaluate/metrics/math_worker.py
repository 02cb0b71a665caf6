"""The process that compares expressions for `molora.evaluate.metrics.mathematics`, started by the path of this file.

It reads a pair of texts a line, says of each pair whether they are equal, and is ended from outside if it is too slow.
"""

import json
import logging
import resource
import sys
from typing import Any


def main() -> None:
    from math_verify import parse, verify

    logging.disable(logging.WARNING)  # it warns that there is no time limit, which is kept outside
    told: dict[str, Any] = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (told["memory_bytes"],) * 2)
    print("ready", flush=True)
    for line in sys.stdin:
        one, other = (parse(text, parsing_timeout=0) for text in json.loads(line))
        options = {"float_rounding": told["decimals"], "timeout_seconds": 0}
        equal = verify(one, other, **options) or verify(other, one, **options)
        print(json.dumps(equal), flush=True)


if __name__ == "__main__":
    main()
