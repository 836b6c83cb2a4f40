// The whole job from a browser's point of view, with the unmodified supabase-js: upload, insert, enqueue, read.
import { createClient } from '@supabase/supabase-js'
import { readFile } from 'node:fs/promises'
import WebSocket from 'ws'

const { SUPABASE_URL, SUPABASE_ANON_KEY, MEMBER_TOKEN, WORKSPACE_ID, PICTURE } = process.env
const supabase = createClient(SUPABASE_URL, SUPABASE_ANON_KEY, {
  realtime: { transport: WebSocket },
  accessToken: async () => MEMBER_TOKEN,
})
const must = ({ data, error }) => {
  if (error) throw new Error(JSON.stringify(error))
  return data
}

const path = `${WORKSPACE_ID}/from-js.png`
must(await supabase.storage.from('assets').upload(path, await readFile(PICTURE), { contentType: 'image/png' }))
const asset = must(
  await supabase.from('assets').insert({ workspace_id: WORKSPACE_ID, storage_path: path }).select('id').single(),
)
const done = new Promise((resolve) => {
  supabase
    .channel(`tagging:${WORKSPACE_ID}`, { config: { private: true } })
    .on('broadcast', { event: 'job-complete' }, ({ payload }) => resolve(payload))
    .subscribe(async (status) => {
      if (status === 'SUBSCRIBED') must(await supabase.rpc('enqueue_tagging', { asset_ids: [asset.id] }))
    })
})
const { job_id } = await done
const job = must(await supabase.rpc('tagging_job', { job_id }))
const row = must(await supabase.from('assets').select('tags,tagging_stage,tagging_progress').eq('id', asset.id).single())
const refused = (await supabase.rpc('enqueue_tagging', { asset_ids: [] })).error
console.log(JSON.stringify({ job, row, refused }))
process.exit(0)
