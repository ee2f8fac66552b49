"""`gemma-mtp doctor`."""

from __future__ import annotations

from gemma_mtp.cli import options
from gemma_mtp.cli.doctor_options import DoctorData, DoctorOutput, ExaminedPair
from gemma_mtp.cli.option_groups import grouped, then


@grouped
@then("doctor_run")
def doctor(models: ExaminedPair, given: DoctorData, output: DoctorOutput) -> None:
    """Find what is slow or wrong: in the machine, the installation and, with --target, a pair.

    Measures each cause of refused drafts by itself, and says what to do. Exits with 1 where something is wrong.
    """
    models.check()
    options.use_threads(models.threads)
