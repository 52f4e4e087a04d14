"""Privacy of a run: differential-privacy accounting, DP-SGD and a membership attack that measures leakage.

Accounting and DP-SGD need the packages of the extra ``privacy``; the attack does not.
"""

from fedkern.privacy.accounting import Accountant, ClientGuarantee, ClientLevel, Figure, least_noise
from fedkern.privacy.bounds import need_accounting
from fedkern.privacy.dpsgd import DPSGD
from fedkern.privacy.guarantee import IMAGE, LEDGER, UNITS, Guarantee, Unit
from fedkern.privacy.membership import Attack, membership_attack

__all__ = [
    "DPSGD", "IMAGE", "LEDGER", "UNITS", "Accountant", "Attack", "ClientGuarantee", "ClientLevel", "Figure",
    "Guarantee", "Unit", "least_noise", "membership_attack", "need_accounting",
]  # fmt: skip
