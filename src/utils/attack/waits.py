"""When an attack may ask the device for a value.

A CPU answers at once. Any other device runs behind: a host that asks waits until all queued work is
done, and queues nothing meanwhile. So attack steps do not ask there, except C&W's and those of
stop_early. What a step would ask stays on the device: which images are fooled, what the report
counts, what is wrong. It is read once, at the end, and fooled images leave the batch only now and
then.
"""

FREE = ("cpu",)  # device types that may be asked at each step


def free_to_ask(x):
    """Whether asking for a value of x costs no waiting."""
    return x.device.type in FREE


def due(t, x):
    """Whether fooled images leave after t steps: always if x is free to ask, else at 0 to 8, 10,
    12, 14, 16, 20, ... A fooled image stays for at most a quarter more steps than it needed, and
    5,000 steps ask 45 times.
    """
    return free_to_ask(x) or t % (1 << max(t.bit_length() - 3, 0)) == 0
