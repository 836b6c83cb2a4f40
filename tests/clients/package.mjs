// The npm package in Node, without window and document, with the unmodified supabase-js: prints what it saw as JSON.
// Environment: SUPABASE_URL, SUPABASE_ANON_KEY, MEMBER_TOKEN, WORKSPACE_ID, ASSET_IDS (JSON).
import { createClient } from '@supabase/supabase-js'
import { AutotagError, createAutotag } from 'supabase-autotag'
import WebSocket from 'ws'

const { SUPABASE_URL, SUPABASE_ANON_KEY, MEMBER_TOKEN, WORKSPACE_ID, ASSET_IDS } = process.env
const seen = { changed: [], events: [], statuses: [] }
const supabase = createClient(SUPABASE_URL, SUPABASE_ANON_KEY, {
  realtime: { transport: WebSocket }, accessToken: async () => MEMBER_TOKEN,
})
const autotag = createAutotag(supabase, { workspaceId: WORKSPACE_ID })

let over
const done = new Promise((resolve) => { over = resolve })
let live
const joined = new Promise((resolve) => { live = resolve })
const stop = autotag.subscribe({
  onStatus: (status) => { seen.statuses.push(status) },
  onSync: () => { live() },
  onChange: (ids) => { seen.changed.push(ids) },
  onProgress: (job) => { seen.events.push(['progress', job]) },
  onJobComplete: (job) => { seen.events.push(['complete', job]); over() },
})
await joined
seen.job = await autotag.enqueue(JSON.parse(ASSET_IDS))
await done
seen.after = await autotag.job(seen.job.job_id)
seen.strategy = await autotag.strategy(60)
seen.limit = await autotag.peekRateLimit('batch', 60)
seen.usage = await autotag.usage()
seen.listed = await autotag.jobs({ limit: 5 }).catch((error) => error.code)
const refusal = async (call) => {
  const error = await call().then(() => null, (error) => error)
  return { ours: error instanceof AutotagError, code: error.code, hint: error.hint, message: error.message, retryAfter: error.retryAfter }
}
seen.refused = await refusal(() => autotag.enqueue([]))
seen.unknown = await refusal(() => autotag.cancel('00000000-0000-4000-8000-000000000000'))
const offline = createAutotag(createClient('http://127.0.0.1:9', 'key', { realtime: { transport: WebSocket } }), { workspaceId: 'w' })
seen.network = await refusal(() => offline.strategy(3))
stop()
console.log(JSON.stringify(seen))
process.exit()
