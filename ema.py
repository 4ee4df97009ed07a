"""
A teacher: the exponential moving average of an encoder, which gets no gradient (Tarvainen, Valpola 2017).

    teacher <- m teacher + (1 - m) encoder    after every step,    m from `start` to `end` over the run

Its embedding of the target is what the encoder's is trained to predict. That it moves slowly, and that no gradient
asks it to be predictable, is what keeps both from the constant embedding: BYOL, I-JEPA and V-JEPA rest on it.
"""
import torch


@torch.no_grad()
def move_teacher(teacher, encoder, momentum, progress):
    """One move, at `progress` (0 to 1) of the run. momentum: (start, end)."""
    start, end = momentum
    m = start + (end - start) * progress
    for slow, fast in zip(teacher.parameters(), encoder.parameters()):
        slow.lerp_(fast, 1 - m)


def check_momentum(momentum):
    """Raise ValueError unless these are two numbers from 0 to 1."""
    if len(momentum) != 2 or not 0 <= min(momentum) <= max(momentum) <= 1:
        raise ValueError(f'--momentum is two numbers from 0 to 1, not {",".join(map(str, momentum))}')
