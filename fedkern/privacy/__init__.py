"""What a run gives away: differential-privacy accounting, and an attack that measures it.

Accounting needs the packages of the extra ``privacy``; the attack needs nothing.
"""

from __future__ import annotations

from fedkern.privacy.accounting import Accountant, Figure, least_noise
from fedkern.privacy.bounds import need_accounting
from fedkern.privacy.dpsgd import DPSGD
from fedkern.privacy.guarantee import LEDGER, Guarantee
from fedkern.privacy.membership import Attack, membership_attack
from fedkern.privacy.unit import IMAGE, UNITS, Unit

__all__ = [
    "DPSGD",
    "IMAGE",
    "LEDGER",
    "UNITS",
    "Accountant",
    "Attack",
    "Figure",
    "Guarantee",
    "Unit",
    "least_noise",
    "membership_attack",
    "need_accounting",
]
