"""Bars where nobody looks: plain lines, as they are."""

from rlcs.progress import Bar


def test_a_note_is_one_line_whatever_stands_in_it(capsys):
    line = "data: rows.jsonl, line 3: must be a file, got '[/image]' :smile: [red]" + 40 * " and more"
    with Bar("SFT") as bar:
        bar.note(line)
        bar(0.5, 1.0, "loss [/b]")
    assert capsys.readouterr().err == f"{line}\nSFT: 50% loss [/b]\n"
