"""Sentences of a report, of finished and unfinished runs."""

from pathlib import Path


def test_masked_blocks_count_as_computed(tmp_path: Path, make_run, page_of) -> None:
    text = page_of(make_run(tmp_path / "masked", mode="mask")).text
    assert "2 stages.0.blocks.2 mask 0.300 0.240 100.0 %" in text
    assert "12.0 % of all branch computations were dropped by a mask, none of them skipped." in text


def test_branches_that_mask_below_their_break_even(run: Path, page_of) -> None:
    path = run / "drop_path.csv"
    path.write_text(path.read_text().replace("0.3,skip", "0.3,skip/mask").replace("0.15,skip", "0.15,mask"))
    assert "2 stages.0.blocks.2 skip/mask 0.300 0.240 88.0 %" in page_of(run).text
    assert "4.0 % of all branch computations were skipped; 12.0 % were dropped in all." in page_of(run).text


def test_unfinished_run(run: Path, page_of) -> None:
    (run / "summary.json").unlink()
    metrics = run / "metrics.csv"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:3]))
    text = page_of(run).text
    assert "Not finished, 2 of 4 epochs in 5.0 s: latest top-1 91.50 %, best 91.50 % at epoch 2." in text
    assert "Images/s 500" in text


def test_summary_of_a_run_that_goes_on_is_not_its_end(run: Path, page_of, config_text) -> None:
    (run / "config.yaml").write_text(config_text.replace("epochs: 4", "epochs: 6"))
    with (run / "metrics.csv").open("a") as file:
        file.write("5,55,0.5,0.4,99.5,100,99,99,2,0.001,0.4,600,12.5\n")
    text = page_of(run).text
    assert "Not finished, 5 of 6 epochs in 12 s: latest top-1 99.50 %, best 99.50 % at epoch 5." in text
    assert "Images/s 600" in text
    assert "Steps 55" in text
