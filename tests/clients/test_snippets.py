"""Every snippet of the documents and every example compiles with ``strict``, and wrong code does not (types.ts)."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from conftest import ROOT
from npm import BIN, PACKAGE, built_package

HERE = Path(__file__).parent
DOCUMENTS = [
    ROOT / "README.md",
    PACKAGE / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / "examples").glob("*.md"),
]
SNIPPET = re.compile(r"^ *```(js|jsx|ts|tsx)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
OPTIONS = {
    "strict": True, "noEmit": True, "target": "ES2022", "lib": ["ES2023", "DOM", "DOM.Iterable"], "module": "ESNext",
    "moduleResolution": "bundler", "moduleDetection": "force", "jsx": "react-jsx", "skipLibCheck": True, "types": ["vite/client"],
}  # fmt: skip


def write_snippets(folder: Path) -> dict[str, tuple[Path, int]]:
    """Writes each snippet into a file of its own. Returns the snippets' places by the files' names."""
    places = {}
    for document in DOCUMENTS:
        text = document.read_text()
        for found in SNIPPET.finditer(text):
            name = f"snippet{len(places)}.{'tsx' if found[1].endswith('x') else 'ts'}"
            (folder / name).write_text(found[2])
            places[name] = (document, text[: found.start(2)].count("\n"))
    return places


def test_snippets_and_examples_compile(tmp_path: Path) -> None:
    built_package()
    (tmp_path / "node_modules").symlink_to(ROOT / "node_modules")
    (tmp_path / "database.ts").write_text(f"export * from '{ROOT}/supabase/types/database'\n")
    (tmp_path / "supabase.ts").write_text(
        "import { createClient } from '@supabase/supabase-js'\nimport type { Database } from './database'\n"
        "export const supabase = createClient<Database>('http://localhost', 'key')\n"
    )
    (tmp_path / "upload.ts").write_text(
        "import type { Database } from './database'\n"
        "export declare function upload(workspaceId: string, files: FileList | null):"
        " Promise<Database['public']['Tables']['assets']['Row'][]>\n"
    )
    places = write_snippets(tmp_path)
    assert len(places) > 20
    examples = [str(path) for name in ("react", "vue") for path in (ROOT / "examples" / name / "src").glob("*.ts*")]
    files = [
        str(HERE / "types.ts"),
        str(HERE / "snippets.d.ts"),
        str(HERE / "react-native.d.ts"),
        *(str(tmp_path / name) for name in places),
        *examples,
    ]
    (tmp_path / "tsconfig.json").write_text(json.dumps({"compilerOptions": OPTIONS, "files": files}))
    done = subprocess.run([BIN / "tsc", "-p", tmp_path], capture_output=True, text=True, check=False, cwd=tmp_path)

    def place(found: re.Match[str]) -> str:
        document, line = places[found[1]]
        return f"{document.relative_to(ROOT)}:{line + int(found[2])}:{found[3]}"

    assert done.returncode == 0, re.sub(r"(snippet\d+\.tsx?)\((\d+),(\d+)\)", place, done.stdout)
