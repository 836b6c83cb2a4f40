import { AutotagError, createAutotag } from 'supabase-autotag'
import type { LiveStatus } from 'supabase-autotag'
import { onUnmounted, ref, shallowRef } from 'vue'
import type { Database } from './database'
import { supabase } from './supabase'

const COLUMNS = 'id, created_at, storage_path, tagging_stage, tagging_progress, tagging_eta, tagging_error, tags'
const SHOWN = 100 // images; the newest ones
type Row = Database['public']['Tables']['assets']['Row']
export type Image = Pick<Row, 'id' | 'created_at' | 'storage_path' | 'tagging_stage' | 'tagging_progress' | 'tagging_eta' | 'tagging_error' | 'tags'>

/** The newest images of a workspace, on the core package: the rows are fetched when a message says that they have changed. */
export function useImages(workspaceId: string) {
  const autotag = createAutotag(supabase, { workspaceId })
  const images = shallowRef<Image[]>([])
  const status = ref<LiveStatus>('connecting')
  const problem = ref('')

  let fetching = false
  let changed: Set<string> | null | undefined // ids; null: all; undefined: none
  /** One request at a time; what changes meanwhile goes into the next one. */
  async function refresh(ids: string[] | null) {
    changed = ids && changed !== null ? new Set([...changed ?? [], ...ids]) : null
    if (fetching) return
    fetching = true
    try {
      while (changed !== undefined) {
        const wanted: Set<string> | null = changed
        changed = undefined
        const newest = supabase.from('assets').select(COLUMNS).eq('workspace_id', workspaceId)
          .order('created_at', { ascending: false }).order('id').limit(SHOWN)
        const { data, error } = await (wanted && wanted.size <= 100 ? newest.in('id', [...wanted]) : newest)
        if (error) { problem.value = error.message; break }
        const known = new Map((wanted ? images.value : []).map((image) => [image.id, image]))
        for (const image of data) known.set(image.id, image)
        images.value = [...known.values()].sort((a, b) => b.created_at.localeCompare(a.created_at) || a.id.localeCompare(b.id)).slice(0, SHOWN)
      }
    } finally {
      fetching = false
    }
  }

  onUnmounted(autotag.subscribe({
    onChange: (ids) => { void refresh(ids) },
    onEnqueued: (ids) => { void refresh([...ids]) },
    onSync: () => { void refresh(null) },
    onStatus: (now) => { status.value = now },
    onUserChange: () => { images.value = [] },
  }))
  void refresh(null)

  async function add(files: readonly File[]) {
    problem.value = ''
    try {
      const ids: string[] = []
      for (const file of files) {
        const path = `${workspaceId}/${crypto.randomUUID()}`
        const { error } = await supabase.storage.from('assets').upload(path, file, { contentType: file.type })
        if (error) throw error
        const { data } = await supabase.from('assets').insert({ workspace_id: workspaceId, storage_path: path }).select('id').single().throwOnError()
        ids.push(data.id)
      }
      await autotag.enqueue(ids)
    } catch (error) {
      problem.value = error instanceof AutotagError ? `${error.message} ${error.hint}` : (error as Error).message
      await refresh(null)
    }
  }

  return { images, status, problem, add }
}
