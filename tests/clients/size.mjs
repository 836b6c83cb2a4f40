// The size of the package's core as a bundler ships it, and what it imports: prints JSON. Argument: its file.
import { gzipSync } from 'node:zlib'
import { rolldown } from 'rolldown'

const bundle = await rolldown({ input: process.argv[2] })
const { output: [chunk] } = await bundle.generate({ minify: true })
console.log(JSON.stringify({ minified: chunk.code.length, gzipped: gzipSync(chunk.code).length, imports: chunk.imports }))
