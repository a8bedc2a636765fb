"""Philox4x32-10 in Python's integers, for what is compared with it."""


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """The paper's figure, in Python integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * a, 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * c, 2**32)
        a, b, c, d = hi1 ^ b ^ k, lo1, hi0 ^ d ^ m, lo0
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return [a, b, c, d]
