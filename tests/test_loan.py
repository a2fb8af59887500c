"""What a loan sums up while bytes land, over retries and parts of it."""

from __future__ import annotations

from streamload.checksums import PartialChecksum, RunningChecksum
from streamload.loan import Loan, Rows


def lend(nbytes: int) -> tuple[bytearray, Loan]:
    memory = bytearray(range(nbytes))
    loan = Loan([memoryview(memory)[:10], memoryview(memory)[10:]])
    loan.checksum = RunningChecksum("CRC64NVME")
    return memory, loan


def whole(memory: bytearray) -> int:
    parts = PartialChecksum("CRC64NVME", len(memory))
    parts.add(0, [memory])
    return parts.result().value


def test_what_lands_is_summed_up() -> None:
    memory, loan = lend(100)
    for view in loan.views:
        loan.landed(view)
    assert loan.checksum is not None
    assert (loan.checksum.nbytes, loan.checksum.value) == (100, whole(memory))


def test_a_retry_goes_on_where_the_sum_ended() -> None:
    memory, loan = lend(100)
    loan.landed(memoryview(memory)[:30])
    rest = loan.after(30)
    for view in rest.views:
        rest.landed(view)
    assert loan.checksum is not None
    assert (loan.checksum.nbytes, loan.checksum.value) == (100, whole(memory))


def test_a_retry_from_elsewhere_gives_the_sum_up() -> None:
    memory, loan = lend(100)
    loan.landed(memoryview(memory)[:30])
    again = loan.after(20)
    again.landed(memoryview(memory)[20:100])
    assert loan.checksum is None


def test_a_loan_that_is_not_summed_up_takes_the_news() -> None:
    loan = Loan([memoryview(bytearray(10))])
    loan.landed(loan.views[0])
    assert loan.checksum is None


def test_a_retry_from_the_beginning_gives_the_sum_up() -> None:
    memory, loan = lend(100)
    loan.landed(memoryview(memory))
    loan.after(0)
    assert loan.checksum is None


def test_rows_are_the_views_that_they_stand_for() -> None:
    memory, scratch = memoryview(bytearray(30)), memoryview(bytearray(4))
    loan = Loan.of_rows(Rows(memory, 10, 7, scratch))
    assert loan.nbytes == 3 * 10 + 2 * 7
    assert [view.nbytes for view in loan.views] == [10, 4, 3, 10, 4, 3, 10]
    assert loan.gaps == (False, True, True, False, True, True, False)
    rest = loan.after(12)
    assert (rest.rows, rest.nbytes, rest.gaps) == (None, 32, (True, True, False, True, True, False))
    for number, view in enumerate(view for view, gap in zip(loan.views, loan.gaps, strict=True) if not gap):
        view[:] = bytes([number]) * 10
    assert bytes(memory) == b"\0" * 10 + b"\1" * 10 + b"\2" * 10
