"""``python -m dgmr_tp``: the entry of processes that the deepspeed launcher starts."""

from dgmr_tp.cli import main

main()
