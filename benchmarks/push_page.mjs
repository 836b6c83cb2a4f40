// Like push.mjs, in a page of headless Chromium: prints when each callback ran, in milliseconds since 1970.
// Environment: SUPABASE_URL, SUPABASE_ANON_KEY, TOPIC, CHROMIUM.
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { chromium } from 'playwright-core'

const { SUPABASE_URL, SUPABASE_ANON_KEY, TOPIC, CHROMIUM } = process.env
const library = join(dirname(createRequire(import.meta.url).resolve('@supabase/supabase-js')), 'umd', 'supabase.js')
const browser = await chromium.launch({ executablePath: CHROMIUM, args: ['--no-sandbox'] })
const page = await browser.newPage()
await page.exposeFunction('printLine', (line) => console.log(JSON.stringify(line)))
await page.addScriptTag({ path: library })
await page.evaluate(([url, key, topic]) => {
  window.supabase.createClient(url, key)
    .channel(topic)
    .on('broadcast', { event: 'ping' }, (message) => {
      const at = performance.timeOrigin + performance.now() // before anything else
      window.printLine({ n: message.payload.n, at })
    })
    .subscribe((status) => window.printLine({ status }))
}, [SUPABASE_URL, SUPABASE_ANON_KEY, TOPIC])
