"""CCVR after a single round of FedAvg."""

from dataclasses import dataclass

from fedkern.methods.baselines.oneshot_fedavg import OneShotFedAvg
from fedkern.methods.method_registry import register
from fedkern.typed_option import option


@register("ccvr")
class CCVR(OneShotFedAvg):
    """One-shot FedAvg with a classifier calibrated on virtual features (CCVR, arXiv 2106.05001).

    Heterogeneous data harm the classifier more than the features.  So every client sends, per class, the count, the
    mean and the covariance of the averaged network's features.  The server draws features from one Gaussian per class,
    N(mean_c, Sigma_c*), and trains the classifier alone on these features:

        Sigma_c* = (1 - rho_c) Sigma_c + rho_c (tr Sigma_c / d) I + 1e-4 I

    rho_c is the oracle approximating shrinkage (arXiv 0907.4698, equation 23).  Sigma_c is exact for any partition of
    the samples.  The classifier trains by SGD without momentum, in batches of 128, for ``calibration_epochs`` passes
    with new features in each.  Classes without samples get no features.

    A client sends at most C (d + d (d + 1) / 2 + 1) numbers of 4 bytes, or C (2 d + 1) with ``covariance=diagonal``.
    The features are computed in eval mode, without augmentation.  ``ccvr_compat`` repeats released code: a second
    moment whose mean is never subtracted, one pass at rate 0.01, no shrinkage, no 1e-4.

    Difference from the paper: a single round of FedAvg precedes the calibration.
    ``fedkern.methods.common.calibration`` has the code, which other methods use with the option ``calibrate``.

    Source: Luo et al., NeurIPS 2021, section 4.
    """

    requires = frozenset({"classes", "features"})

    @dataclass(frozen=True)
    class Options(OneShotFedAvg.Options):
        """Options of one-shot FedAvg, with calibration by default."""

        calibrate: bool = option(True, "train the classifier anew on features drawn from class statistics (CCVR)")
