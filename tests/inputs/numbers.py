"""Numbers in options: not finite, out of range, given twice, or in another notation."""

from __future__ import annotations

from inputs import Case

CASES = [
    Case("--damping nan", "prune -o out --recover . --damping nan", says="--damping nan is not a finite number"),
    Case(
        "--damping -1", "prune -o out --recover . --damping -1", says="--damping -1 is out of range. Give a number of 0"
    ),
    Case("--damping inf", "recover . --images . -o out --damping inf", says="--damping inf is not a finite number"),
    Case("--tune-blocks -1", "prune -o out --recover . --tune-blocks -1", says="Invalid value for '--tune-blocks'"),
    Case("--tune-blocks alone", "prune -o out --tune-blocks 5", says="Give --recover IMAGES."),
    Case("--threshold nan", "amp --images . -o out --threshold nan", says="--threshold nan is not a finite number"),
    Case("--threshold -1", "amp --images . -o out --threshold -1", says="--threshold -1 is out of range"),
    Case("--temperature nan", "amp --images . -o out --temperature nan", says="--temperature nan is not a finite"),
    Case("--temperature 0", "amp --images . -o out --temperature 0", says="--temperature 0 is out of range"),
    Case("--mlp-ratio nan", "prune -o out --mlp-ratio nan", says="--mlp-ratio nan is not a finite number"),
    Case("--mlp-ratio inf", "plan --mlp-ratio inf", says="--mlp-ratio inf is not a finite number"),
    Case("--keep-ratio nan", "plan --keep-ratio nan", says="Give a number above 0 and up to 1."),
    Case("--keep-ratio 1.5", "plan --keep-ratio 1.5", says="--keep-ratio 1.5 is out of range"),
    Case("--keep 1.5", "plan --keep 1.5", says="Invalid value for '--keep'"),
    Case("--min-cosine nan", "prune -o out --recover . --min-cosine nan", says="--min-cosine nan is not a finite"),
    Case("--min-cosine 1", "prune -o out --recover . --min-cosine 1", says="--min-cosine 1 is out of range"),
    Case("--max-drop nan%", "prune -o out --recover . --max-drop nan%", says="--max-drop: nan is not a finite number"),
    Case("--max-drop 200%", "prune -o out --recover . --max-drop 200%", says="max_drop = 2.0 is out of range"),
    Case("--keep nan of compare", "compare a b -o out --images . --keep nan", says="--keep nan is not a finite number"),
    Case("--convenient 2", "compare a b -o out --images . --convenient 2", says="--convenient 2 is out of range"),
    Case("--workers -1", "compare a b -o out --images . --workers -1", says="Invalid value for '--workers'"),
    Case(
        "--rate nan",
        "estimate quickstart --devices 1x80GB --rate nan",
        says="--rate nan: images per second must be above 0",
    ),
    Case(
        "--rate inf",
        "estimate quickstart --devices 1x80GB --rate inf",
        says="--rate inf: images per second must be above 0",
    ),
    Case("--tolerance nan", "export demo -o out --tolerance onnx=nan", says="--tolerance: nan is not a finite number"),
    Case("--tolerance 0", "export demo -o out --tolerance onnx=0", says="--tolerance onnx=0 is not above 0"),
    Case("--tolerance of two formats at once", "export demo -o out --tolerance onnx", says="onnx is not NAME=NUMBER"),
    Case(
        "--tolerance twice",
        "export demo -o out --tolerance onnx=0.1 --tolerance onnx=0.2",
        says="--tolerance names onnx more than once",
    ),
    Case("--formats twice", "export demo -o out --formats onnx,onnx", says="--formats names onnx more than once"),
    Case("--formats with an unknown name", "export demo -o out --formats onnx,", says="names '', which is unknown"),
    Case("--outputs twice", "export demo -o out --outputs embedding,embedding", says="--outputs names embedding more"),
    Case("--budget nan", "plan --budget params=nan", says="--budget: nan is not a finite number"),
    Case("--budget -1", "plan --budget params=-1", says="budget params = -1.0 is not positive"),
    Case(
        "--budget with a key twice", "plan --budget params=0.9,params=0.7", says="--budget names params more than once"
    ),
    Case("--budget twice", "plan --budget params=0.9 --budget params=0.90", says="--budget params=0.9 is given more"),
    Case("--budget without a number", "plan --budget params", says="--budget params is not NAME=NUMBER"),
    Case("--budget with spaces", "plan --budget 'params=0.8, flops=0.8'", code=0, says="transformer.resblocks.5.mlp"),
    Case("an empty path", "prune -o out --plan ''", says="the argument after --plan is empty"),
    Case("an empty output", "prune -o ''", says="the argument after -o is empty"),
    Case("a directory as a plan", "prune -o out --plan .", says="Invalid value for '--plan': . is not a file"),
    Case("a directory as rankings", "plan --rankings .", says="Invalid value for '--rankings': . is not a file"),
    Case(
        "a file as a run directory",
        "report r.txt",
        lambda folder: (folder / "r.txt").write_text(""),
        says="r.txt is not a directory",
    ),
    Case(
        "a file as the directory of results",
        "eval demo --knn-train . --knn-test . -o r.txt",
        lambda folder: (folder / "r.txt").write_text(""),
        says="Invalid value for '--out'",
    ),
]
