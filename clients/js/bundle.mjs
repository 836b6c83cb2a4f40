// Writes the core as one file for a page without a bundler: node bundle.mjs FILE. The demo's gallery has it (lab/page/autotag.js).
import { fileURLToPath } from 'node:url'
import { rolldown } from 'rolldown'

const cwd = fileURLToPath(new URL('.', import.meta.url))
const bundle = await rolldown({ cwd, input: './dist/index.js', treeshake: { moduleSideEffects: false } })
const banner = '// Generated from clients/js/src: npm --prefix clients/js run bundle'
await bundle.write({ file: process.argv[2], format: 'esm', banner, comments: false })
