// Bundles a page for the browser: node build.mjs ENTRY OUTPUT. React's development build, because only that has StrictMode.
import { rolldown } from 'rolldown'

const [input, file] = process.argv.slice(2)
const bundle = await rolldown({
  input, platform: 'browser', logLevel: 'silent', transform: { define: { 'process.env.NODE_ENV': '"development"' }, jsx: 'react-jsx' },
})
await bundle.write({ file, format: 'esm' })
