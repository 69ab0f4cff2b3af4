"""The child process that compares two mathematical expressions with math-verify, one request a line.

Run by `checker.py` as `python -m opensloth.rewards.verifier`. It may hang or run out of memory on a hostile expression
(`10^{10^{10}}` parses at once and never evaluates): whoever asks waits a limited time and kills it. It is a module of
its own, not multiprocessing's spawn, because that would import the caller's script or notebook a second time.

Request: `{"answer": text, "gold": text, "limit": seconds}`. Answer: `true` or `false`. The first line is `"ready"`.
"""

import json
import logging
import signal
import sys

MEMORY_BYTES = 4 << 30
WARM_UP = ("\\frac{1}{2}", "0.5")


def main() -> None:
    """Answer requests until stdin ends."""
    # math-verify warns about every call without its own time limit, which only works in a main thread
    logging.disable(logging.CRITICAL)
    limit_memory()
    requests, answers = sys.stdin, sys.stdout
    sys.stdout = sys.stderr  # a library that prints would break the protocol
    equal(*WARM_UP)  # the parser's tables load at its first use, which must not count against a request
    print('"ready"', file=answers, flush=True)
    for line in requests:
        request = json.loads(line)
        die_after(2 * request["limit"] + 1)
        result = equal(request["answer"], request["gold"])
        die_after(0)
        print(json.dumps(result), file=answers, flush=True)


def equal(answer: str, gold: str) -> bool:
    """Whether two expressions, as LaTeX or plain text without `$`, have the same value."""
    from math_verify import parse, verify

    left, right = (parse(f"${text}$", parsing_timeout=None) for text in (gold, answer))
    return bool(verify(left, right, allow_set_relation_comp=True, timeout_seconds=None))


def limit_memory() -> None:
    """Keep an expression from taking the machine's memory; the process then dies, which its parent notices."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def die_after(seconds: float) -> None:
    """Let the kernel end this process, should its parent be gone while it hangs. 0 takes that back.

    The signal's default action needs no Python code to run: a power of big integers never gives the interpreter back.
    """
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)


if __name__ == "__main__":
    main()
