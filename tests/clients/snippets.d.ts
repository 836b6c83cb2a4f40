// What snippets of the documents take for granted.
import type { SupabaseClient } from '@supabase/supabase-js'
import type { Autotag } from 'supabase-autotag'
import type { Database } from '../../supabase/types/database.js'

declare global {
  type Row = Database['public']['Tables']['assets']['Row']
  const supabase: SupabaseClient<Database>
  /** A client with the secret key. */
  const admin: SupabaseClient<Database>
  const autotag: Autotag<SupabaseClient<Database>>
  const ids: string[]
  const asset: Row
  const job_id: string
  const batch_id: string
  const webhook_id: string
  const workspace_id: string
  const workspaceId: string
  const typed: string
  const files: File[]
  function show(value: unknown): void
  function complain(text: string): void
  function refetchAssets(): void
}
