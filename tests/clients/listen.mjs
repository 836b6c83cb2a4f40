// The existing client's snippet, with the unmodified supabase-js: prints every batch-complete as a line of JSON.
// Environment: SUPABASE_URL, SUPABASE_ANON_KEY; MEMBER_TOKEN for a signed-in client; PRIVATE_TOPIC to join one too.
import { createClient } from '@supabase/supabase-js'
import WebSocket from 'ws'

const { SUPABASE_URL, SUPABASE_ANON_KEY, MEMBER_TOKEN, PRIVATE_TOPIC } = process.env
const say = (line) => console.log(JSON.stringify(line))
const supabase = createClient(SUPABASE_URL, SUPABASE_ANON_KEY, {
  realtime: { transport: WebSocket },
  ...(MEMBER_TOKEN ? { accessToken: async () => MEMBER_TOKEN } : {}),
})

supabase
  .channel('batch-updates')
  .on('broadcast', { event: 'batch-complete' }, (message) => say({ event: message.event, payload: message.payload }))
  .subscribe((status, error) => say({ topic: 'batch-updates', status, error: error?.message }))

if (PRIVATE_TOPIC) {
  if (MEMBER_TOKEN) await supabase.realtime.setAuth(MEMBER_TOKEN)
  supabase
    .channel(PRIVATE_TOPIC, { config: { private: true } })
    .on('broadcast', { event: '*' }, (message) => say({ private: message.event, payload: message.payload }))
    .subscribe((status, error) => say({ topic: PRIVATE_TOPIC, status, error: error?.message }))
}
