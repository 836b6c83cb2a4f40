// Calls RPCs with the unmodified supabase-js: a line of JSON in ({token, function, args}), a line out ({data, error}).
import { createClient } from '@supabase/supabase-js'
import { createInterface } from 'node:readline'
import WebSocket from 'ws'

const { SUPABASE_URL, SUPABASE_ANON_KEY } = process.env
const clients = new Map()
const clientOf = (token) => {
  if (!clients.has(token)) {
    const options = { realtime: { transport: WebSocket }, ...(token ? { accessToken: async () => token } : {}) }
    clients.set(token, createClient(SUPABASE_URL, SUPABASE_ANON_KEY, options))
  }
  return clients.get(token)
}

for await (const line of createInterface({ input: process.stdin })) {
  const { token, function: name, args } = JSON.parse(line)
  const { data, error } = await clientOf(token).rpc(name, args)
  console.log(JSON.stringify({ data, error }))
}
process.exit(0)
