"""`gemma-mtp doctor`."""

from __future__ import annotations

from gemma_mtp.cli import options
from gemma_mtp.cli.doctor_options import DoctorData, DoctorOutput, ExaminedPair
from gemma_mtp.cli.option_groups import grouped


@grouped
def doctor(models: ExaminedPair, given: DoctorData, output: DoctorOutput) -> None:
    """Look at the machine and the installation and, with --target, at a pair: whether it fits, and why few drafts are
    accepted.

    Each cause of low acceptance is measured by itself, and ends in what to do. Exits with 1 where something is wrong.
    """
    models.check()
    options.use_threads(models.threads)

    from gemma_mtp.cli import doctor_run

    doctor_run.doctor(models, given, output)
